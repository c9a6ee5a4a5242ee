// Order by score, for kernels. Torch-free.
#pragma once
#include "common/device.cuh"

namespace fastok::cuda {

// Ascends from the best score.
__device__ inline uint32_t descending_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 and 0 are the same
  return bits >> 31 ? bits : bits ^ 0x7fffffffu;
}

// A sort key, then the index: equal keys go by index.
__device__ inline uint64_t ordered(uint32_t key, int i) { return uint64_t(key) << 32 | unsigned(i); }

// Sorts keys[count], a power of two, ascending. Bitonic: each step compares pairs that are `step` apart.
__device__ inline void sort_in_block(uint64_t* keys, int count) {
  for (int span = 2; span <= count; span *= 2) {
    for (int step = span / 2; step > 0; step /= 2) {
      for (int pair = int(threadIdx.x); pair < count / 2; pair += int(blockDim.x)) {
        const int low = (pair & ~(step - 1)) * 2 + (pair & (step - 1)), high = low + step;
        const uint64_t a = keys[low], b = keys[high];
        if ((a > b) == ((low & span) == 0)) keys[low] = b, keys[high] = a;
      }
      // Pairs at most a warp apart stay with their warp as long as the next ones do.
      const int next = step > 1 ? step / 2 : span;
      if (step <= kWarpSize && next <= kWarpSize) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    }
  }
  __syncthreads();
}

}  // namespace fastok::cuda
