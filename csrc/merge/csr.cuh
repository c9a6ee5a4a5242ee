// A map as CSR, built by one block: shared by build_map and by the kernels that end a match. Torch-free.
#pragma once
#include "common/device.cuh"
#include "merge/merge_plan.h"

namespace fastok::cuda {

// slot[n] (outside [0, n_out) = dropped) to offsets[n_out + 1] and members[n], ascending and padded with -1. Takes
// plan.bytes of `memory`; `scratch` is one int per warp. `slot` must be visible to the whole block and may not overlap
// the results. Deterministic: atomics only count.
__device__ inline void build_csr(const int32_t* slot, int n, int n_out, const CsrPlan& plan, SharedMemory& memory,
                                 int* scratch, int32_t* offsets, int32_t* members) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const int stretch = ((n + plan.warps - 1) / plan.warps + kWarpSize - 1) / kWarpSize * kWarpSize;
  // Without room in shared memory the one warp's cursor of slot m is offsets[m + 1]: it starts at the slot's begin and
  // arrives at its end, which is what belongs there.
  int* const cursor = plan.shared ? memory.take<int>(plan.warps * n_out, "cursors") : offsets + 1;

  // How many tokens each warp's stretch has for each slot.
  for (int i = thread; i < plan.warps * n_out; i += threads) cursor[i] = 0;
  if (thread == 0) offsets[0] = 0;
  __syncthreads();
  for (int i = thread; i < n; i += threads) {
    const int s = slot[i];
    if (unsigned(s) < unsigned(n_out)) atomicAdd(&cursor[i / stretch * n_out + s], 1);
  }
  __syncthreads();

  // Where each stretch's tokens begin: slot by slot, and within a slot stretch by stretch.
  int carry = 0;
  for (int base = 0; base < n_out; base += threads) {
    const int m = base + thread;
    int length = 0, total;
    for (int w = 0; m < n_out && w < plan.warps; ++w) length += cursor[w * n_out + m];
    int begin = carry + block_exclusive_sum(length, scratch, total);
    if (m < n_out && plan.shared) offsets[m + 1] = begin + length;
    for (int w = 0; m < n_out && w < plan.warps; ++w) {
      const int count = cursor[w * n_out + m];
      cursor[w * n_out + m] = begin;
      begin += count;
    }
    carry += total;
  }
  __syncthreads();

  // Each warp deals out its stretch in order, 32 tokens at a time; of those that share a slot, the lowest moves the
  // cursor for all.
  const int lane = lane_index(), warp = warp_index();
  const int end = warp < plan.warps ? min(n, (warp + 1) * stretch) : 0;
  for (int base = warp * stretch; base < end; base += kWarpSize) {
    const int i = base + lane;
    const int s = i < end && unsigned(slot[i]) < unsigned(n_out) ? slot[i] : -1;
    const unsigned peers = __match_any_sync(kFullWarp, s);
    const int leader = __ffs(int(peers)) - 1;
    int place = 0;
    if (s >= 0 && lane == leader) {
      place = cursor[warp * n_out + s];
      cursor[warp * n_out + s] = place + __popc(peers);
    }
    place = __shfl_sync(kFullWarp, place, leader) + __popc(peers & ((1u << lane) - 1));
    if (s >= 0) members[place] = i;
    __syncwarp();  // the next leader of this slot may be another lane
  }
  for (int i = carry + thread; i < n; i += threads) members[i] = -1;
}

}  // namespace fastok::cuda
