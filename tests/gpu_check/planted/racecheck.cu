// For racecheck: with the bug, nothing orders one warp's writes to shared memory before another warp's reads.
#include "common.h"

__global__ void reverse(int* array, bool ordered) {
  __shared__ int values[128];
  values[threadIdx.x] = array[threadIdx.x];
  if (ordered) __syncthreads();
  array[threadIdx.x] = values[127 - threadIdx.x];
}

int main(int argc, char** argv) {
  int* array = device_array(128);
  check(cudaMemset(array, 0, 128 * sizeof(int)));
  reverse<<<1, 128>>>(array, !wants_bug(argc, argv));
  check(cudaGetLastError());
  check(cudaDeviceSynchronize());
}
