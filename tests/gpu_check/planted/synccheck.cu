// For synccheck: with the bug, the last sixteen threads of the block do not come to the barrier in the loop.
#include "common.h"

__global__ void running_sum(const int* array, int* sum, int rounds, int count) {
  __shared__ int values[64];
  values[threadIdx.x] = 0;
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    const int place = round * 64 + int(threadIdx.x);
    if (place < count) {
      values[threadIdx.x] += array[place];
      __syncthreads();
    }
  }
  if (threadIdx.x == 0) {
    int total = 0;
    for (const int value : values) total += value;
    *sum = total;
  }
}

int main(int argc, char** argv) {
  const int rounds = 4, count = rounds * 64;
  int *array = device_array(count), *sum = device_array(1);
  check(cudaMemset(array, 0, count * sizeof(int)));
  running_sum<<<1, 64>>>(array, sum, rounds, wants_bug(argc, argv) ? count - 16 : count);
  check(cudaGetLastError());
  cudaDeviceSynchronize();  // fails under synccheck once it has caught the bug
}
