// Sample kernels of what Hopper added, as features.cuh and planted.cuh have them of the rest. `s.map` copies tiles of
// 64 rows of `in`. Blocks of one warpgroup.
#pragma once
#include "ptx/cvt.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#include "samples.h"

namespace simt::features {

using namespace fastok::ptx;
using fastok::cuda::SharedMemory;

constexpr int kTileBytes = 64 * kSwizzleRow;

// `in` is a[64,72], b[64,72], c[64,72], one below the other; chunks of 64 columns are copied, the second of which is
// mostly outside. out: d = a b^T, then d c[:,:64] with d rounded to fp16, each [64,64].
__global__ void tile_products(Sample s) {
  FASTOK_SHARED_TILES(shared);
  SharedMemory memory(shared);
  auto* const tiles = memory.take<unsigned char>(5 * kTileBytes, "tiles", kSwizzleBlock);
  auto* const barriers = memory.take<Mbarrier>(2, "barriers");
  const int t = int(threadIdx.x);
  if (t == 0) {
    mbarrier_init(barriers[0], 1);
    mbarrier_init(barriers[1], 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (t == 0) {
    mbarrier_arrive_expect_tx(barriers[0], 4 * kTileBytes);
    for (int i = 0; i < 4; ++i)
      cp_async_bulk_tensor_4d(tiles + i * kTileBytes, s.map, barriers[0], i % 2 * 64, i / 2 * 64, 0, 0);
    mbarrier_arrive_expect_tx(barriers[1], kTileBytes);
    cp_async_bulk_tensor_4d(tiles + 4 * kTileBytes, s.map, barriers[1], 0, 128, 0, 0);
  }
  mbarrier_wait(barriers[0], 0);
  float d[8][4], e[8][4] = {};
  wgmma_fence();
  for (int step = 0; step < 8; ++step) {
    const int offset = step / 4 * kTileBytes + step % 4 * 32;
    wgmma_rows<fastok::f16, 64>(d, rows_descriptor(tiles + offset), rows_descriptor(tiles + 2 * kTileBytes + offset),
                                step > 0);
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();
  mbarrier_wait(barriers[1], 0);
  uint32_t factors[4][4];
  for (int i = 0; i < 16; ++i) {
    const float* const pair = &d[i / 4 * 2 + i % 4 / 2][i % 2 * 2];
    factors[i / 4][i % 4] = cvt_rn_f16x2(pair[0], pair[1]);
  }
  for (int step = 0; step < 4; ++step)
    wgmma_columns<fastok::f16, 64>(e, factors[step],
                                   columns_descriptor(tiles + 4 * kTileBytes + step * 16 * kSwizzleRow, 0));
  wgmma_commit_group();
  wgmma_wait_group<0>();
  for (int i = 0; i < 32; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
    s.to<float>()[row * 64 + column] = d[i / 4][i % 4];
    s.to<float>()[(64 + row) * 64 + column] = e[i / 4][i % 4];
  }
}

// Results are there when their group has been waited for, and not before: out is 0 (one group left), then 16.
__global__ void late_product(Sample s) {
  FASTOK_SHARED_TILES(shared);
  auto* const tile = SharedMemory(shared).take<unsigned char>(kTileBytes, "tile", kSwizzleBlock);
  const int t = int(threadIdx.x);
  constexpr uint32_t kOnes = 0x3c003c00;  // two fp16 ones
  for (int i = t * 16; i < kTileBytes; i += 128 * 16)
    *reinterpret_cast<fastok::cuda::Pack<uint32_t, 4>*>(tile + i) = {{kOnes, kOnes, kOnes, kOnes}};
  fence_proxy_async();
  __syncthreads();
  float d[8][4] = {};
  wgmma_fence();
  wgmma_rows<fastok::f16, 64>(d, rows_descriptor(tile), rows_descriptor(tile), true);
  wgmma_commit_group();
  wgmma_wait_group<1>();
  s.to<float>()[2 * t] = d[0][0];
  wgmma_wait_group<0>();
  s.to<float>()[2 * t + 1] = d[0][0];
}

}  // namespace simt::features

namespace simt::planted {

using namespace features;

// A tile, a barrier for it, and what thread 0 does to fill it.
struct OneTile {
  unsigned char* tile;
  Mbarrier* barriers;

  __device__ OneTile() {
    FASTOK_SHARED_TILES(shared);
    SharedMemory memory(shared);
    tile = memory.take<unsigned char>(2 * kTileBytes, "tile", kSwizzleBlock);
    barriers = memory.take<Mbarrier>(2, "barriers");
  }
  __device__ void initialise(int arrivals) const {
    if (threadIdx.x == 0) mbarrier_init(barriers[0], 1), mbarrier_init(barriers[1], arrivals);
    __syncthreads();
  }
  __device__ void send(const Sample& s, int offset, int bytes) const {
    mbarrier_arrive_expect_tx(barriers[0], bytes);
    cp_async_bulk_tensor_4d(tile + offset, s.map, barriers[0], 0, 0, 0, 0);
  }
};

template <bool kCorrect>
__global__ void tile_without_wait(Sample s) {
  const OneTile one;
  one.initialise(1);
  if (threadIdx.x == 0) one.send(s, 0, kTileBytes);
  if (threadIdx.x >= 64) {
    if (kCorrect) mbarrier_wait(one.barriers[0], 0);
    s.to()[threadIdx.x - 64] = one.tile[threadIdx.x * 16];
  }
}

template <bool kCorrect>
__global__ void misaligned_tile(Sample s) {
  const OneTile one;
  one.initialise(1);
  if (threadIdx.x == 0) one.send(s, kCorrect ? 1024 : 512, kTileBytes);
  mbarrier_wait(one.barriers[0], 0);
  if (threadIdx.x < 64) s.to()[threadIdx.x] = 0;
}

template <bool kCorrect>
__global__ void bytes_that_never_come(Sample s) {
  const OneTile one;
  one.initialise(1);
  if (threadIdx.x == 0) one.send(s, 0, kCorrect ? kTileBytes : kTileBytes + 16);
  mbarrier_wait(one.barriers[0], 0);
  if (threadIdx.x < 64) s.to()[threadIdx.x] = 0;
}

template <bool kCorrect>
__global__ void mbarrier_not_initialised(Sample s) {
  const OneTile one;
  if (kCorrect) one.initialise(128);
  if (!kCorrect && threadIdx.x == 0) one.barriers[1].state = 0;
  __syncthreads();
  mbarrier_arrive(one.barriers[1]);
  if (threadIdx.x < 64) s.to()[threadIdx.x] = 0;
}

// The second phase's tile overwrites the first one while products of it may still run.
template <bool kCorrect>
__global__ void released_before_the_product(Sample s) {
  const OneTile one;
  one.initialise(4);
  if (threadIdx.x == 0) one.send(s, 0, kTileBytes);
  mbarrier_wait(one.barriers[0], 0);
  float d[8][4];
  wgmma_fence();
  wgmma_rows<fastok::f16, 64>(d, rows_descriptor(one.tile), rows_descriptor(one.tile), false);
  wgmma_commit_group();
  if (kCorrect) wgmma_wait_group<0>();
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(one.barriers[1]);
  if (threadIdx.x == 0) {
    mbarrier_wait(one.barriers[1], 0);
    one.send(s, 0, kTileBytes);
  }
  __syncwarp();
  wgmma_wait_group<0>();
  if (threadIdx.x < 64) s.to()[threadIdx.x] = int(d[0][0]);
}

template <bool kCorrect>
__global__ void product_never_waited_for(Sample s) {
  const OneTile one;
  one.initialise(1);
  if (threadIdx.x == 0) one.send(s, 0, kTileBytes);
  mbarrier_wait(one.barriers[0], 0);
  float d[8][4];
  wgmma_rows<fastok::f16, 64>(d, rows_descriptor(one.tile), rows_descriptor(one.tile), false);
  if (kCorrect) {
    wgmma_commit_group();
    wgmma_wait_group<0>();
  }
  if (threadIdx.x < 64) s.to()[threadIdx.x] = 0;
}

template <bool kCorrect>
__global__ void part_of_a_warpgroup(Sample s) {
  const OneTile one;
  one.initialise(1);
  if (threadIdx.x == 0) one.send(s, 0, kTileBytes);
  mbarrier_wait(one.barriers[0], 0);
  if (threadIdx.x < 64) s.to()[threadIdx.x] = 0;
  if (!kCorrect && threadIdx.x / 32 == 2) return;
  float d[8][4];
  wgmma_rows<fastok::f16, 64>(d, rows_descriptor(one.tile), rows_descriptor(one.tile), false);
  wgmma_commit_group();
  wgmma_wait_group<0>();
}

template <bool kCorrect>
__global__ void arrival_too_many(Sample s) {
  const OneTile one;
  one.initialise(2);
  if (threadIdx.x < (kCorrect ? 2 : 1)) mbarrier_arrive(one.barriers[1]);
  if (!kCorrect && threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(one.barriers[1], 16);  // a phase that only bytes could end now
    mbarrier_arrive(one.barriers[1]);
  }
  if (threadIdx.x < 64) s.to()[threadIdx.x] = 0;
}

}  // namespace simt::planted
