// Kernels with a bug each, and their correct twins (kCorrect): what test_detectors.py shows to be found. `out` has n
// ints unless said otherwise.
#pragma once
#include "ptx/cp_async.h"
#include "ptx/ldmatrix.h"
#include "ptx/mma.h"
#include "samples.h"

namespace simt::planted {

using fastok::cuda::Pack;
using fastok::cuda::SharedMemory;

inline int thread() { return int(threadIdx.x); }

// ---- races ----------------------------------------------------------------------------------------------------------

// out = in, backwards.
template <bool kCorrect>
__global__ void missing_barrier(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  values[thread()] = 0;
  __syncthreads();
  values[thread()] = s.from()[thread()];
  if (kCorrect) __syncthreads();
  s.to()[thread()] = values[s.n - 1 - thread()];
}

// The same in static shared memory.
template <bool kCorrect>
__global__ void missing_barrier_static(Sample s) {
  FASTOK_STATIC_SHARED(int, values, 64);
  values[thread()] = 0;
  __syncthreads();
  values[thread()] = s.from()[thread()];
  if (kCorrect) __syncthreads();
  s.to()[thread()] = values[s.n - 1 - thread()];
}

// The same in each warp. A vote lets the lanes meet, but orders nothing.
template <bool kCorrect>
__global__ void missing_syncwarp(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  values[thread()] = s.from()[thread()];
  const unsigned all = __ballot_sync(0xffffffffu, 1);
  if (kCorrect) __syncwarp(all);
  s.to()[thread()] = values[thread() ^ 31];
}

// Lane 0 writes, lanes 1 to 15 are synchronised with it, and the others are not.
template <bool kCorrect>
__global__ void partial_syncwarp(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(1, "values");
  if (thread() == 0) values[0] = 0;
  __syncwarp();
  if (thread() == 0) values[0] = 7;
  const unsigned half = kCorrect ? 0xffffffffu : thread() < 16 ? 0x0000ffffu : 0xffff0000u;
  __syncwarp(half);
  s.to()[thread()] = values[0];
}

// Who only arrives at a barrier does not know what the others have done.
template <bool kCorrect>
__global__ void arrive_without_wait(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  values[thread()] = 0;
  __syncthreads();
  values[thread()] = thread();
  if (kCorrect || thread() < 32) {
    bar_sync(1, 64);
  } else {
    bar_arrive(1, 64);
  }
  s.to()[thread()] = thread() < 32 ? 0 : values[thread() - 32];
}

template <bool kCorrect>
__global__ void barrier_of_part_of_a_warp(Sample s) {
  s.to()[thread()] = 0;
  if (kCorrect || thread() < 16) bar_sync(1, kCorrect ? 64 : 16);
}

template <bool kCorrect>
__global__ void same_value(Sample s) {
  FASTOK_SHARED(shared);
  int* const flag = SharedMemory(shared).take<int>(1, "flag");
  if (thread() == 0) flag[0] = 0;
  __syncthreads();
  if (kCorrect) {
    atomicOr(reinterpret_cast<unsigned*>(flag), 1u);
  } else {
    flag[0] = 1;
  }
  __syncthreads();
  s.to()[thread()] = flag[0];
}

// Bytes of one word may be different threads' own; the same byte may not.
template <bool kCorrect>
__global__ void byte_race(Sample s) {
  FASTOK_SHARED(shared);
  auto* const bytes = SharedMemory(shared).take<unsigned char>(s.n, "bytes");
  bytes[kCorrect ? thread() : thread() / 2] = 1;
  __syncthreads();
  s.to()[thread()] = bytes[kCorrect ? thread() : thread() / 2];
}

template <bool kCorrect>
__global__ void plain_counter(Sample s) {
  for (int i = thread(); i < s.n; i += int(blockDim.x)) s.to()[i] = 0;
  __syncthreads();
  if (kCorrect) {
    atomicAdd(s.to(), 1);
  } else {
    s.to()[0] += 1;
  }
}

// Every block writes its own element, or all of them the last.
template <bool kCorrect>
__global__ void block_race(Sample s) {
  const int i = int(blockIdx.x);
  if (thread() == 0) s.to()[i] = i;
  if (thread() == 0 && !kCorrect) s.to()[s.n - 1] = s.n - 1;
}

// out[0], zeroed before, counts blocks; the last one adds up what the others left in out[1 + block].
template <bool kCorrect>
__global__ void last_block(Sample s) {
  FASTOK_SHARED(shared);
  int* const ticket = SharedMemory(shared).take<int>(1, "ticket");
  if (thread() == 1) s.to()[1 + blockIdx.x] = int(blockIdx.x);
  __syncthreads();
  if (thread() == 0) {
    if (kCorrect) __threadfence();
    ticket[0] = atomicAdd(s.to(), 1);
    __threadfence();
  }
  __syncthreads();
  if (ticket[0] != int(gridDim.x) - 1 || thread() != 2) return;
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += s.to()[1 + i];
  s.to()[0] = sum;
}

// ---- barriers and masks ---------------------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void divergent_barrier(Sample s) {
  s.to()[thread()] = 0;
  if (kCorrect || thread() < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

template <bool kCorrect>
__global__ void early_exit(Sample s) {
  s.to()[thread()] = 0;
  if (!kCorrect && thread() == 40) return;
  __syncthreads();
}

template <bool kCorrect>
__global__ void deadlock(Sample s) {
  s.to()[thread()] = 0;
  if (kCorrect || thread() != 3) __syncwarp();
  __syncthreads();
}

template <bool kCorrect>
__global__ void foreign_mask(Sample s) {
  s.to()[thread()] = 0;
  __syncwarp(kCorrect || thread() != 5 ? 0xffffffffu : 0xffffffdfu);
}

template <bool kCorrect>
__global__ void unequal_masks(Sample s) {
  const unsigned mask = kCorrect || thread() % 32 >= 16 ? 0xffffffffu : 0x0000ffffu;
  s.to()[thread()] = __shfl_xor_sync(mask, thread(), 1);
}

template <bool kCorrect>
__global__ void unequal_collectives(Sample s) {
  if (kCorrect || thread() % 2 == 0) {
    s.to()[thread()] = int(__ballot_sync(0xffffffffu, 1));
  } else {
    s.to()[thread()] = __any_sync(0xffffffffu, 1);
  }
}

template <bool kCorrect>
__global__ void absent_source(Sample s) {
  s.to()[thread()] = 0;
  if (thread() % 32 >= 16) return;
  s.to()[thread()] = __shfl_sync(0x0000ffffu, thread(), kCorrect ? 15 : 16);
}

// ---- bounds ---------------------------------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void shared_overrun(Sample s) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  int* const first = memory.take<int>(s.n, "first");
  int* const second = memory.take<int>(s.n, "second");
  first[thread() + (kCorrect ? 0 : 4)] = thread();
  second[thread()] = 0;
  s.to()[thread()] = 0;
}

template <bool kCorrect>
__global__ void static_overrun(Sample s) {
  FASTOK_STATIC_SHARED(int, low, 64);
  FASTOK_STATIC_SHARED(int, high, 64);
  low[thread() + (kCorrect ? 0 : 4)] = thread();
  high[thread()] = 0;
  s.to()[thread()] = 0;
}

template <bool kCorrect>
__global__ void global_overrun(Sample s) {
  s.to()[thread()] = s.from()[thread() + (kCorrect ? 0 : 1)];
}

// `in` is a view of n rows of 3 ints, 5 apart.
template <bool kCorrect>
__global__ void view_overrun(Sample s) {
  int sum = 0;
  for (int i = 0; i < (kCorrect ? 3 : 4); ++i) sum += s.from()[thread() * 5 + i];
  s.to()[thread()] = sum;
}

// A copy that the compiler leaves to the C library.
template <bool kCorrect>
__global__ void library_overrun(Sample s) {
  if (thread() == 0) std::memcpy(s.out, s.in, (size_t(s.n) + (kCorrect ? 0 : 1)) * sizeof(int));
}

template <bool kCorrect>
__global__ void other_stack(Sample s) {
  FASTOK_SHARED(shared);
  const int** const pointer = SharedMemory(shared).take<const int*>(1, "pointer");
  int local = thread();
  if (thread() == 0) pointer[0] = &local;
  __syncthreads();
  s.to()[thread()] = kCorrect ? local : *pointer[0];
  __syncthreads();
}

template <bool kCorrect>
__global__ void too_much_shared(Sample s) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  memory.take<int>(s.n - 1, "first");
  memory.take<int>(kCorrect ? 1 : 5, "second");
  s.to()[thread()] = 0;
}

template <bool kCorrect>
__global__ void input_write(Sample s) {
  s.to()[thread()] = 0;
  if (!kCorrect) const_cast<int*>(s.from())[thread()] = 0;
}

// ---- initialisation -------------------------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void uninitialised_shared(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  if (kCorrect || thread() != 9) values[thread()] = thread();
  s.to()[thread()] = values[thread()];
}

// What was written before the memory was divided anew means nothing in the new arrays.
template <bool kCorrect>
__global__ void stale_shared(Sample s) {
  FASTOK_SHARED(shared);
  SharedMemory(shared).take<int>(s.n, "before")[thread()] = 1;
  __syncthreads();
  int* const after = SharedMemory(shared).take<int>(s.n, "after");
  if (kCorrect) after[thread()] = 2;
  s.to()[thread()] = after[thread()];
}

template <bool kCorrect>
__global__ void unwritten_output(Sample s) {
  if (kCorrect || thread() != 11) s.to()[thread()] = 0;
}

template <bool kCorrect>
__global__ void unwritten_read(Sample s) {
  if (kCorrect) s.to()[thread()] = 1;
  s.to()[thread()] += 1;
}

template <bool kCorrect>
__global__ void copy_without_wait(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  fastok::ptx::cp_async_16(values + 4 * thread(), s.from() + 4 * thread(), true);
  if (kCorrect) fastok::ptx::cp_async_wait_all();
  for (int i = 4 * thread(); i < 4 * thread() + 4; ++i) s.to()[i] = values[i];
}

// A wait is for one's own copies; a barrier is for others'.
template <bool kCorrect>
__global__ void copy_without_barrier(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  fastok::ptx::cp_async_16(values + 4 * thread(), s.from() + 4 * thread(), true);
  fastok::ptx::cp_async_wait_all();
  if (kCorrect) __syncthreads();
  for (int i = thread(); i < s.n; i += int(blockDim.x)) s.to()[i] = values[i];
}

// ---- alignment and undefined behaviour ------------------------------------------------------------------------------

template <bool kCorrect>
__global__ void misaligned_vector(Sample s) {
  s.to()[thread()] = 0;
  if (thread() > 0) return;
  const auto four = *reinterpret_cast<const Pack<int, 4>*>(s.from() + (kCorrect ? 4 : 3));
  s.to()[0] = four.at[0];
}

template <bool kCorrect>
__global__ void misaligned_copy(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  if (thread() == 0) fastok::ptx::cp_async_16(values, s.from() + (kCorrect ? 4 : 3), true);
  fastok::ptx::cp_async_wait_all();
  s.to()[thread()] = 0;
}

template <bool kCorrect>
__global__ void misaligned_atomic(Sample s) {
  s.to()[thread()] = 0;
  __syncthreads();
  atomicAdd(reinterpret_cast<unsigned long long*>(s.to() + (kCorrect ? 2 : 1)), 1ull);
}

// A quarter of a row too far.
template <bool kCorrect>
__global__ void misaligned_matrix(Sample s) {
  FASTOK_SHARED(shared);
  auto* const tile = SharedMemory(shared).take<uint16_t>(5 * 64, "tile");
  for (int i = thread(); i < 5 * 64; i += 32) tile[i] = uint16_t(i);
  __syncwarp();
  uint32_t words[4];
  fastok::ptx::ldmatrix_x4(words, tile + 8 * thread() + (kCorrect ? 0 : 4));
  s.to()[thread()] = int(words[0]);
}

// The tensor core's instructions are the whole warp's.
template <bool kCorrect>
__global__ void part_of_a_warp(Sample s) {
  s.to()[thread()] = 0;
  if (!kCorrect && thread() == 7) return;
  float d[4] = {};
  fastok::ptx::mma_m16n8k16_f16(d, {0, 0, 0, 0}, 0, 0);
}

template <bool kCorrect>
__global__ void wide_shift(Sample s) {
  s.to()[thread()] = 1 << (kCorrect ? thread() % 31 : thread());
}

template <bool kCorrect>
__global__ void overflow(Sample s) {
  s.to()[thread()] = s.from()[thread()] * (kCorrect ? 1 : 1 << 30);
}

template <bool kCorrect>
__global__ void array_index(Sample s) {
  int local[4] = {1, 2, 3, 4};
  s.to()[thread()] = local[thread() % (kCorrect ? 4 : 5)];
}

}  // namespace simt::planted
