// Kernels that use one thing each of what the machine offers; test_machine.py knows what they should find.
#pragma once
#include "ptx/cp_async.h"
#include "ptx/cvt.h"
#include "ptx/ex2.h"
#include "ptx/ldmatrix.h"
#include "ptx/mma.h"
#include "samples.h"

namespace simt::features {

using fastok::cuda::SharedMemory;

// Grid, block and thread in three dimensions, to out[block][thread][9].
__global__ void indices(Sample s) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* const out = s.to() + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 9;
  const unsigned values[] = {blockIdx.x,  blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y,
                             threadIdx.z, gridDim.y,  blockDim.x, blockDim.y};
  for (int i = 0; i < 9; ++i) out[i] = int(values[i]);
}

// Predicate: in[thread]. To out[4 * thread].
__global__ void block_votes(Sample s) {
  const int t = int(threadIdx.x), predicate = s.from()[t];
  int* const out = s.to() + 4 * t;
  out[0] = __syncthreads_count(predicate);
  out[1] = __syncthreads_and(predicate);
  out[2] = __syncthreads_or(predicate);
  __syncthreads();
  out[3] = 0;
}

// Each half of a warp does as the lane value of in[thread] says, in 14 ways, to out[14 * thread].
__global__ void collectives(Sample s) {
  const int t = int(threadIdx.x), value = s.from()[t];
  const unsigned mask = t % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  int* const out = s.to() + 14 * t;
  out[0] = __shfl_sync(mask, value, 3, 8);
  out[1] = __shfl_up_sync(mask, value, 3, 8);
  out[2] = __shfl_down_sync(mask, value, 3, 8);
  out[3] = __shfl_xor_sync(mask, value, 5, 8);
  out[4] = int(__ballot_sync(mask, value > 1));
  out[5] = __any_sync(mask, value > 8);
  out[6] = __all_sync(mask, value > -9);
  out[7] = int(__match_any_sync(mask, value));
  out[8] = int(__match_all_sync(mask, value, out + 9));
  out[10] = __reduce_add_sync(mask, value);
  out[11] = __reduce_min_sync(mask, value);
  out[12] = __reduce_max_sync(mask, value);
  out[13] = int(__reduce_and_sync(mask, unsigned(value)) ^ __reduce_or_sync(mask, unsigned(value)) ^
                __reduce_xor_sync(mask, unsigned(value)));
}

// The lower half of each warp has gone when the others vote with all lanes in the mask.
__global__ void vote_of_the_rest(Sample s) {
  s.to()[threadIdx.x] = 0;
  if (threadIdx.x % 32 < 16) return;
  s.to()[threadIdx.x] = int(__ballot_sync(0xffffffffu, 1));
}

// Every thread's in[thread] into out's ten words, zeroed before.
__global__ void atomics(Sample s) {
  const int value = s.from()[threadIdx.x];
  int* const out = s.to();
  auto* const words = reinterpret_cast<unsigned*>(out);
  atomicAdd(out, value);
  atomicMin(out + 1, value);
  atomicMax(out + 2, value);
  atomicOr(words + 3, unsigned(value));
  atomicXor(words + 4, unsigned(value));
  atomicInc(words + 5, 9);
  atomicAdd(reinterpret_cast<unsigned long long*>(out + 6), (unsigned long long)(value) << 20);
  atomicAdd(reinterpret_cast<float*>(out + 8), 0.5f);
  // A lock-free multiplication: out[9] becomes 3^threads, from 1.
  if (threadIdx.x == 0) atomicExch(out + 9, 1);
  __syncthreads();
  for (int seen = 1, old; (old = atomicCAS(out + 9, seen, int(unsigned(seen) * 3u))) != seen;) seen = old;
}

// Warps 0 and 1 hand a value over through barrier 1, warps 2 and 3 through barrier 2.
__global__ void named_barriers(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  const int t = int(threadIdx.x), pair = t / 64;
  values[t] = s.from()[t];
  bar_sync(1 + pair, 64);
  s.to()[t] = values[t ^ 63];
}

// Warp 1 produces, and only warp 0 waits.
__global__ void arrive(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(32, "values");
  const int t = int(threadIdx.x);
  if (t >= 32) {
    values[t - 32] = s.from()[t];
    s.to()[t] = 0;
    bar_arrive(3, 64);
  } else {
    bar_sync(3, 64);
    s.to()[t] = values[t];
  }
}

// A static array is the block's, wherever its function is called from, and stays as it is when the dynamic memory is
// divided anew.
__device__ inline int* static_values() {
  FASTOK_STATIC_SHARED(int, values, 64);
  return values;
}
__global__ void static_arrays(Sample s) {
  FASTOK_SHARED(shared);
  const int t = int(threadIdx.x);
  static_values()[t] = s.from()[t];
  SharedMemory(shared).take<int>(s.n, "before")[t] = 0;
  __syncthreads();
  int* const after = SharedMemory(shared).take<int>(s.n, "after");
  after[t] = static_values()[s.n - 1 - t];
  s.to()[t] = after[t];
}

// Two groups of copies: the first is waited for while the second is under way.
__global__ void copy_groups(Sample s) {
  FASTOK_SHARED(shared);
  int* const values = SharedMemory(shared).take<int>(s.n, "values");
  const int half = s.n / 2, own = 4 * int(threadIdx.x);
  begin_copy(values + own, s.from() + own, 16, true);
  fastok::ptx::cp_async_commit();
  begin_copy(values + half + own, s.from() + half + own, 16, own != 0);
  fastok::ptx::cp_async_commit();
  fastok::ptx::cp_async_wait_groups<1>();
  for (int i = own; i < own + 4; ++i) s.to()[i] = values[i];
  fastok::ptx::cp_async_wait_all();
  for (int i = own; i < own + 4; ++i) s.to()[half + i] = values[half + i];
}

// A flag in shared memory instead of a barrier: warp 1 spins until warp 0 has released what it wrote.
__global__ void flag(Sample s) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  int* const values = memory.take<int>(1, "values");
  auto* const ready = memory.take<unsigned>(1, "ready");
  if (threadIdx.x == 0) ready[0] = 0;
  __syncthreads();
  s.to()[threadIdx.x] = 0;
  if (threadIdx.x == 0) {
    values[0] = 5;
    __threadfence();
    atomicExch(ready, 1u);
  } else if (threadIdx.x == 32) {
    while (atomicOr(ready, 0u) == 0) continue;
    __threadfence();
    s.to()[32] = values[0];
  }
}

// Every block adds one to a 64-bit ticket, out[0] and out[1], zeroed before; the last one sets it back.
__global__ void wide_ticket(Sample s) {
  if (threadIdx.x > 0) return;
  auto* const ticket = s.to<unsigned long long>();
  __threadfence();
  const bool last = atomicAdd(ticket, 1ull) == gridDim.x - 1;
  __threadfence();
  if (last) *ticket = 0;
}

// in: eight 8x8 matrices of 16 bits. Through ldmatrix and stmatrix, two of them transposed on each way.
__global__ void matrices(Sample s) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  auto* const from = memory.take<uint16_t>(4 * 64, "from");
  auto* const to = memory.take<uint16_t>(4 * 64, "to");
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 4 * 64; i += 32) from[i] = s.from<uint16_t>()[i];
  __syncwarp();
  uint32_t words[4], pair[2], one;
  fastok::ptx::ldmatrix_x4(words, from + 8 * lane);
  ldmatrix(pair, 2, from + 8 * (lane % 16), true);
  ldmatrix(&one, 1, from + 8 * (lane % 8), false);
  stmatrix(words, 4, to + 8 * lane, true);
  __syncwarp();
  auto* const out = s.to<uint16_t>();
  for (int i = lane; i < 4 * 64; i += 32) out[i] = to[i];
  __syncwarp();
  stmatrix(pair, 2, to + 8 * (lane % 16), false);
  stmatrix(&one, 1, to + 8 * (16 + lane % 8), false);
  __syncwarp();
  for (int i = lane; i < 3 * 64; i += 32) out[4 * 64 + i] = to[i];
}

// in: four 8x8 matrices of 16 bits; out: each of them transposed.
__global__ void transposed_matrices(Sample s) {
  FASTOK_SHARED(shared);
  auto* const from = SharedMemory(shared).take<uint16_t>(4 * 64, "from");
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 4 * 64; i += 32) from[i] = s.from<uint16_t>()[i];
  __syncwarp();
  uint32_t words[4];
  fastok::ptx::ldmatrix_x4_trans(words, from + 8 * lane);
  for (int i = 0; i < 8; ++i) s.to<uint16_t>()[i / 2 * 64 + lane * 2 + i % 2] = uint16_t(words[i / 2] >> (i % 2 * 16));
}

// in: two numbers for each lane; out: them rounded to fp16, then to bf16; the second's power of two.
__global__ void conversions(Sample s) {
  const int lane = int(threadIdx.x);
  const float low = s.from<float>()[2 * lane], high = s.from<float>()[2 * lane + 1];
  s.to<uint32_t>()[lane] = fastok::ptx::cvt_rn_f16x2(low, high);
  s.to<uint32_t>()[32 + lane] = fastok::ptx::cvt_rn_bf16x2(low, high);
  s.to<float>()[64 + lane] = fastok::ptx::ex2_approx_ftz(high);
}

// A number each, rounded to an integer.
__global__ void rounding(Sample s) { s.to()[threadIdx.x] = __float2int_rn(s.from<float>()[threadIdx.x]); }

// in: A [16, k], B [8, k] of T, then D [16, 8] of fp32; out: D + A B^T. k is 16, or 8 for tf32.
template <class T, int kDepth>
__global__ void product(Sample s) {
  const int lane = int(threadIdx.x);
  const T* const a = s.from<T>();
  const T* const b = a + 16 * kDepth;
  const auto* const d = reinterpret_cast<const float*>(b + 8 * kDepth);
  constexpr int kPacked = kDepth / 8;
  const auto pack = [&](const T* row, int part) {
    uint32_t word = 0;
    for (int i = 0; i < kPacked; ++i) {
      const T value = row[(lane % 4 + 4 * part) * kPacked + i];
      if constexpr (kPacked == 1) {
        word = fastok::ptx::cvt_rna_tf32(value);
      } else {
        word |= uint32_t(value.bits) << (16 * i);
      }
    }
    return word;
  };
  const T *const upper = a + lane / 4 * kDepth, *const lower = upper + 8 * kDepth,
                 *const column = b + lane / 4 * kDepth;
  const uint32_t words[4] = {pack(upper, 0), pack(lower, 0), pack(upper, 1), pack(lower, 1)};
  float sum[4];
  const auto place = [&](int i) { return (lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2; };
  for (int i = 0; i < 4; ++i) sum[i] = d[place(i)];
  if constexpr (kPacked == 1) {
    fastok::ptx::mma_m16n8k8_tf32(sum, words, pack(column, 0), pack(column, 1));
  } else if constexpr (std::is_same_v<T, fastok::f16>) {
    fastok::ptx::mma_m16n8k16_f16(sum, words, pack(column, 0), pack(column, 1));
  } else {
    fastok::ptx::mma_m16n8k16_bf16(sum, words, pack(column, 0), pack(column, 1));
  }
  for (int i = 0; i < 4; ++i) s.to<float>()[place(i)] = sum[i];
}

}  // namespace simt::features
