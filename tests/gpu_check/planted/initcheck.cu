// For initcheck: with the bug, only a quarter of what the kernel reads was ever written.
#include "common.h"

__global__ void add_one(int* array) { array[threadIdx.x] += 1; }

int main(int argc, char** argv) {
  const int count = 128;
  int* array = device_array(count);
  check(cudaMemset(array, 0, wants_bug(argc, argv) ? count : count * sizeof(int)));
  add_one<<<1, count>>>(array);
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
}
