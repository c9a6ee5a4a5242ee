// Sample kernels of clusters, as features.cuh and planted.cuh have them of the rest. Blocks of 64 threads, clusters of
// s.n blocks.
#pragma once
#include "ptx/cluster.h"
#include "samples.h"

namespace simt::features {

using namespace fastok::ptx;
using fastok::cuda::SharedMemory;

__device__ inline void meet() {
  barrier_cluster_arrive();
  barrier_cluster_wait();
}
__device__ inline int global_thread() { return int(blockIdx.x * blockDim.x + threadIdx.x); }

// Round by round each block hands the next one of its cluster what it was handed, by a load and by a store by turns;
// out: the number that in[thread] of each block has become after n - 1 rounds, and the block's rank.
__global__ void cluster_ring(Sample s) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  auto* const values = memory.take<uint32_t>(2 * 64, "values");
  const int t = int(threadIdx.x), rank = cluster_ctarank();
  values[t] = uint32_t(s.from()[global_thread()]);
  meet();
  for (int round = 0; round + 1 < s.n; ++round) {
    const uint32_t* const from = values + round % 2 * 64;
    uint32_t* const to = values + (round + 1) % 2 * 64;
    if (round % 2 == 0) {
      to[t] = ld_shared_cluster(mapa(from + t, (rank + s.n - 1) % s.n));
    } else {
      st_shared_cluster(mapa(to, (rank + 1) % s.n) + 4 * uint32_t(t), from[t]);
    }
    meet();
  }
  s.to()[2 * global_thread()] = int(values[(s.n + 1) % 2 * 64 + t]);
  s.to()[2 * global_thread() + 1] = rank;
}

// What is written in global memory before the barrier is read after it, by another block; between arriving and waiting
// each block goes on with its own.
__global__ void cluster_split(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(64, "values");
  const int t = int(threadIdx.x), blocks = int(gridDim.x), block = int(blockIdx.x);
  s.to()[global_thread()] = block;
  barrier_cluster_arrive();
  values[t] = t;
  __syncthreads();
  const int own = values[63 - t];
  barrier_cluster_wait();
  s.to()[(blocks + block) * 64 + t] = 100 * s.to()[(block ^ 1) * 64 + t] + own;
}

// The last cluster to take a ticket, out[0], zeroed before, reads what the others' blocks wrote: their first blocks
// fenced for all of the cluster, after its barrier.
__global__ void cluster_ticket(Sample s) {
  FASTOK_SHARED(shared);
  int* const ticket = SharedMemory(shared).take<int>(1, "ticket");
  const int t = int(threadIdx.x), rank = cluster_ctarank();
  if (t == 0) s.to()[1 + blockIdx.x] = 1;
  meet();
  if (rank != 0) return;
  if (t == 0) {
    __threadfence();
    ticket[0] = atomicAdd(s.to(), 1);
    __threadfence();
  }
  __syncthreads();
  if (ticket[0] != int(gridDim.x) / s.n - 1 || t != 0) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += s.to()[1 + i];
  s.to()[0] = sum;
}

}  // namespace simt::features

namespace simt::planted {

using namespace features;

// A word per thread for every block of the cluster, and what all these kernels begin with.
__device__ inline uint32_t* cluster_values() {
  FASTOK_SHARED(shared);
  return SharedMemory(shared).take<uint32_t>(64, "values");
}

// Reads what the neighbour writes, without or with a barrier of the cluster in between: one of the block is none.
template <bool kCorrect>
__global__ void read_without_cluster_barrier(Sample s) {
  uint32_t* const values = cluster_values();
  values[threadIdx.x] = 0;
  meet();
  values[threadIdx.x] = uint32_t(global_thread());
  if (kCorrect) {
    meet();
  } else {
    __syncthreads();
  }
  s.to()[global_thread()] = int(ld_shared_cluster(mapa(values + threadIdx.x, cluster_ctarank() ^ 1)));
  meet();
}

// All write into the last block's memory: one word, or one each.
template <bool kCorrect>
__global__ void two_blocks_write(Sample s) {
  uint32_t* const values = cluster_values();
  const int rank = cluster_ctarank();
  meet();
  if (threadIdx.x == 0) st_shared_cluster(mapa(values + (kCorrect ? rank : 0), s.n - 1), 1);
  meet();
  s.to()[global_thread()] = 0;
}

// The next value goes where the neighbour may still be reading the last one, or to a second place.
template <bool kCorrect>
__global__ void one_buffer_for_two_rounds(Sample s) {
  FASTOK_SHARED(shared);
  auto* const values = SharedMemory(shared).take<uint32_t>(2, "values");
  const int other = cluster_ctarank() ^ 1;
  meet();
  uint32_t sum = 0;
  for (int round = 0; round < 3; ++round) {
    uint32_t* const value = values + (kCorrect ? round % 2 : 0);
    if (threadIdx.x == 0) st_shared_cluster(mapa(value, other), uint32_t(round));
    meet();
    sum += *value;
  }
  s.to()[global_thread()] = int(sum);
}

// What is done between arriving and waiting is not released.
template <bool kCorrect>
__global__ void written_after_arriving(Sample s) {
  uint32_t* const values = cluster_values();
  values[threadIdx.x] = 0;
  meet();
  if (kCorrect) values[threadIdx.x] = 1;
  barrier_cluster_arrive();
  if (!kCorrect) values[threadIdx.x] = 1;
  barrier_cluster_wait();
  s.to()[global_thread()] = int(ld_shared_cluster(mapa(values + threadIdx.x, cluster_ctarank() ^ 1)));
  meet();
}

// In global memory.
template <bool kCorrect>
__global__ void cluster_block_race(Sample s) {
  s.to()[global_thread()] = 0;
  meet();
  if (threadIdx.x == 7) s.to()[kCorrect ? global_thread() : 7] = 1;
}

template <bool kCorrect>
__global__ void remote_overrun(Sample s) {
  uint32_t* const values = cluster_values();
  values[threadIdx.x] = 1;
  meet();
  const uint32_t address = mapa(values, cluster_ctarank() ^ 1) + 4 * (threadIdx.x + (kCorrect ? 0 : 1));
  s.to()[global_thread()] = int(ld_shared_cluster(address));
  meet();
}

template <bool kCorrect>
__global__ void block_beyond_the_cluster(Sample s) {
  uint32_t* const values = cluster_values();
  values[threadIdx.x] = 1;
  meet();
  s.to()[global_thread()] = int(ld_shared_cluster(mapa(values + threadIdx.x, kCorrect ? s.n - 1 : s.n)));
  meet();
}

// Global memory has no counterpart in another block.
template <bool kCorrect>
__global__ void global_address_mapped(Sample s) {
  uint32_t* const values = cluster_values();
  values[threadIdx.x] = 1;
  meet();
  const void* const place = kCorrect ? static_cast<const void*>(values) : s.in;
  s.to()[global_thread()] = int(ld_shared_cluster(mapa(place, 0)));
  meet();
}

// A block that divides its memory in another way than the one it writes to.
template <bool kCorrect>
__global__ void divided_differently(Sample s) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const bool swapped = !kCorrect && cluster_ctarank() == 1;
  auto* const first = memory.take<uint32_t>(64, swapped ? "values" : "sums");
  memory.take<uint32_t>(64, swapped ? "sums" : "values");
  meet();
  st_shared_cluster(mapa(first + threadIdx.x, cluster_ctarank() ^ 1), 1);
  meet();
  s.to()[global_thread()] = int(first[threadIdx.x]);
}

template <bool kCorrect>
__global__ void uninitialised_remote(Sample s) {
  uint32_t* const values = cluster_values();
  if (kCorrect || cluster_ctarank() == 0 || threadIdx.x != 9) values[threadIdx.x] = 1;
  meet();
  s.to()[global_thread()] = int(ld_shared_cluster(mapa(values + threadIdx.x, cluster_ctarank() ^ 1)));
  meet();
}

template <bool kCorrect>
__global__ void before_the_blocks_have_met(Sample s) {
  uint32_t* const values = cluster_values();
  if (kCorrect) meet();
  st_shared_cluster(mapa(values + threadIdx.x, cluster_ctarank() ^ 1), 1);
  meet();
  s.to()[global_thread()] = int(values[threadIdx.x]);
}

// A block may exit before its neighbour has read its memory.
template <bool kCorrect>
__global__ void exit_without_cluster_barrier(Sample s) {
  uint32_t* const values = cluster_values();
  values[threadIdx.x] = 1;
  meet();
  s.to()[global_thread()] = int(ld_shared_cluster(mapa(values + threadIdx.x, cluster_ctarank() ^ 1)));
  if (kCorrect) meet();
}

template <bool kCorrect>
__global__ void block_skips_the_cluster_barrier(Sample s) {
  s.to()[global_thread()] = 0;
  if (kCorrect || cluster_ctarank() == 0) meet();
}

// A warp that meets the cluster while the rest of its block waits for it.
template <bool kCorrect>
__global__ void cluster_barrier_in_a_branch(Sample s) {
  s.to()[global_thread()] = 0;
  if (kCorrect || threadIdx.x < 32) meet();
  __syncthreads();
}

template <bool kCorrect>
__global__ void wait_without_arrival(Sample s) {
  s.to()[global_thread()] = 0;
  if (kCorrect || threadIdx.x != 5) barrier_cluster_arrive();
  barrier_cluster_wait();
}

template <bool kCorrect>
__global__ void arrival_without_wait(Sample s) {
  s.to()[global_thread()] = 0;
  barrier_cluster_arrive();
  if (kCorrect || threadIdx.x != 5) barrier_cluster_wait();
}

template <bool kCorrect>
__global__ void second_arrival(Sample s) {
  s.to()[global_thread()] = 0;
  barrier_cluster_arrive();
  if (!kCorrect && threadIdx.x == 5) barrier_cluster_arrive();
  barrier_cluster_wait();
}

}  // namespace simt::planted
