// For memcheck: with the bug, the last thread writes one element past the end.
#include "common.h"

__global__ void fill(int* array, int count) {
  if (int(threadIdx.x) < count) array[threadIdx.x] = int(threadIdx.x);
}

int main(int argc, char** argv) {
  const int count = 64;
  int* array = device_array(count);
  fill<<<1, 128>>>(array, wants_bug(argc, argv) ? count + 1 : count);
  check(cudaGetLastError());
  cudaDeviceSynchronize();  // fails under memcheck once it has caught the bug
}
