// What the Hopper kernels of attention share: tiles in shared memory, copied by the hardware, as rings of stages
// between the warp that copies and the warpgroups that compute. Torch-free.
#pragma once
#include "attention/attention_sm90_params.h"
#include "ptx/bar.h"
#include "ptx/setmaxnreg.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"

namespace fastok::cuda::sm90 {

constexpr int kChunk = ptx::kSwizzleRow / 2;  // elements of a row of a tile

// Starts copying `rows` tokens of a head: chunks of 64 elements, one tile behind the other.
template <int kWidth>
__device__ __forceinline__ void send_tokens(unsigned char* tiles, int rows, const TiledHeads& from,
                                            ptx::Mbarrier& barrier, int token, int head, int batch) {
#pragma unroll
  for (int chunk = 0; chunk < kWidth / kChunk; ++chunk)
    ptx::cp_async_bulk_tensor_4d(tiles + chunk * rows * ptx::kSwizzleRow, from.map, barrier, chunk * kChunk, token,
                                 head * from.head_step, batch * from.batch_step);
}

// Tile i of a stream lies in stage i % kStages, from when `full` says so until all consumers have said so by `empty`.
template <int kStages>
struct Ring {
  ptx::Mbarrier *full, *empty;

  __device__ static int stage(int i) { return i % kStages; }
  __device__ static int parity(int i) { return i / kStages % 2; }

  __device__ void initialise(int producers, int consumers) const {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full[i], producers);
      ptx::mbarrier_init(empty[i], consumers);
    }
  }
  __device__ __forceinline__ void wait_full(int i) const { ptx::mbarrier_wait(full[stage(i)], parity(i)); }
  __device__ __forceinline__ void wait_empty(int i) const {
    if (i >= kStages) ptx::mbarrier_wait(empty[stage(i)], parity(i - kStages));
  }
  // Once per warp, when it needs the tile no longer.
  __device__ __forceinline__ void release(int i) const {
    __syncwarp();
    if (lane_index() == 0) ptx::mbarrier_arrive(empty[stage(i)]);
  }
};

// acc = 64 rows of `a` times kTile rows of `b`, kWidth elements deep; `a_rows` and `b_rows` lie in each chunk.
template <class T, int kWidth>
__device__ __forceinline__ void multiply_tiles(const unsigned char* a, int a_rows, const unsigned char* b, int b_rows,
                                               float (&acc)[kTile / 8][4]) {
  ptx::keep_in_place(acc);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kWidth / 16; ++step) {
    const int chunk = step * kStepBytes / ptx::kSwizzleRow, within = step * kStepBytes % ptx::kSwizzleRow;
    ptx::wgmma_rows<T, kTile>(acc, ptx::rows_descriptor(a + chunk * a_rows * ptx::kSwizzleRow + within),
                              ptx::rows_descriptor(b + chunk * b_rows * ptx::kSwizzleRow + within), step > 0);
  }
  ptx::wgmma_commit_group();
}

}  // namespace fastok::cuda::sm90
