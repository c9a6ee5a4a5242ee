// Label scores on CUDA: a thread has the tokens of 16 bytes of codes, which it reads channel by channel; the queries'
// chosen channels are in shared memory. Torch-free.
#pragma once
#include "common/integers.cuh"
#include "sparse/label_code.h"
#include "sparse/label_scores_plan.h"

namespace fastok::cuda {

struct LabelParams {
  const void* q;  // [B, S, H, D]
  Dtype q_dtype;
  int64_t q_batch_stride, q_row_stride, q_head_stride, q_stride;
  int rows, heads, width;
  const int64_t* channels;  // [lists, r], each for heads / lists query heads
  int lists, r;
  const void* data;  // codes [B, labels, r, T], int4 [B, labels, (r + 1) / 2, T]; tokens are contiguous
  int64_t batch_stride, head_stride, channel_stride;
  int labels;
  const f16* scale;  // [B, labels, T], nullptr: none
  int64_t scale_batch_stride, scale_head_stride;
  bool aligned, scale_aligned;  // all rows begin at multiples of 16 bytes
  Integers lengths;             // [B]
  float* out;                   // [B, out_heads, T]
  int out_heads, tokens;

  int held, tiles;  // by the plan

  __device__ float query(int64_t b, int head, int row, int c) const {
    const int64_t channel = channels[int64_t(head / (heads / lists)) * r + c];
    if (channel < 0 || channel >= width) return __uint_as_float(0x7fc00000u);  // NaN: the user's list is wrong
    const int64_t at = b * q_batch_stride + row * q_row_stride + head * q_head_stride + channel * q_stride;
    if (q_dtype == Dtype::f16) return widen(static_cast<const f16*>(q)[at]);
    if (q_dtype == Dtype::bf16) return widen(static_cast<const bf16*>(q)[at]);
    return static_cast<const float*>(q)[at];
  }
};

// kCount neighbours, of which only `there` are to be read: 16 bytes at a time if they are all there and aligned.
template <int kCount, class T>
__device__ __forceinline__ void load_neighbors(const T* from, int there, bool aligned, T (&x)[kCount]) {
  constexpr int kEach = 16 / int(sizeof(T));
  static_assert(kCount % kEach == 0);
  if (aligned && there >= kCount) {
#pragma unroll
    for (int i = 0; i < kCount / kEach; ++i) {
      const auto pack = *reinterpret_cast<const Pack<T, kEach>*>(from + i * kEach);
#pragma unroll
      for (int j = 0; j < kEach; ++j) x[i * kEach + j] = pack.at[j];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = i < there ? from[i] : T{};
  }
}

// ---- labels ---------------------------------------------------------------------------------------------------------

// An unsigned number below 2^23, minus another, as a float: its bits become those of 2^23 + x.
__device__ __forceinline__ float small_difference(uint32_t x, float less) {
  return __uint_as_float(0x4b000000u | x) - (8388608.0f + less);
}

__device__ __forceinline__ float label_of(float x, bool) { return x; }
__device__ __forceinline__ float label_of(f16 x, bool) { return widen(x); }
__device__ __forceinline__ float label_of(bf16 x, bool) { return widen(x); }
__device__ __forceinline__ float label_of(int8_t x, bool) { return small_difference(uint8_t(x) ^ 0x80u, 128.0f); }
__device__ __forceinline__ float label_of(int4_pair x, bool high) {
  return small_difference(high ? x.bits >> 4 : x.bits & 15u, 8.0f);
}

template <class Code>
constexpr int kChannelsOfCode = 1;
template <>
inline constexpr int kChannelsOfCode<int4_pair> = 2;

// The larger one; NaN wins, as in torch's amax.
__device__ __forceinline__ float larger_or_nan(float a, float b) { return a > b || isnan(a) ? a : b; }

// Grid: a block per tile of tokens, head of the result, and sample.
template <class Code, int kQueries>
__global__ void __launch_bounds__(kLabelThreads, label_blocks(label_tokens(sizeof(Code)) * kQueries))
    label_scores_kernel(const LabelParams p) {
  constexpr int kTokens = label_tokens(sizeof(Code));
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  float* const picked = memory.take<float>(p.held * p.r, "picked");  // [r, held]
  const int tile = int(blockIdx.x % unsigned(p.tiles)), out_head = int(blockIdx.x / unsigned(p.tiles)) % p.out_heads;
  const int64_t b = blockIdx.x / unsigned(p.tiles) / unsigned(p.out_heads);
  const int length = p.lengths.length(b, p.tokens), first_token = tile * kLabelThreads * kTokens;
  const int begin = first_token + int(threadIdx.x) * kTokens;
  const int there = begin < length ? min(p.tokens - begin, kTokens) : 0;  // to be read

  float best[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) best[i] = -__builtin_huge_valf();

  // Query heads that have the same labels, `held` of their rows at a time.
  const int group = p.heads / p.out_heads, sharing = p.heads / p.labels, together = min(sharing, group);
  const int data_rows = (p.r + kChannelsOfCode<Code> - 1) / kChannelsOfCode<Code>;
  const int last_head = first_token < length ? (out_head + 1) * group : 0;
  for (int head = out_head * group; head < last_head; head += together) {
    const int64_t label = head / sharing;
    const Code* const codes = static_cast<const Code*>(p.data) + b * p.batch_stride + label * p.head_stride + begin;
    const int queries = together * p.rows;
    for (int first = 0; first < queries; first += p.held) {
      const int count = min(p.held, (queries - first + kQueries - 1) / kQueries * kQueries);
      __syncthreads();  // nobody needs the ones before any more
      for (int i = int(threadIdx.x); i < count * p.r; i += kLabelThreads) {
        const int query = min(first + i / p.r, queries - 1), c = i % p.r;
        picked[c * p.held + i / p.r] = p.query(b, head + query / p.rows, query % p.rows, c);
      }
      __syncthreads();
      if (there == 0) continue;

      for (int q = 0; q < count; q += kQueries) {
        float sum[kQueries][kTokens] = {};
#pragma unroll(kTokens == 16 ? 2 : 4)
        for (int row = 0; row < data_rows; ++row) {
          Code x[kTokens];
          load_neighbors(codes + row * p.channel_stride, there, p.aligned, x);
#pragma unroll
          for (int part = 0; part < kChannelsOfCode<Code>; ++part) {
            const int c = part * data_rows + row;
            if (c == p.r) continue;  // an odd number of channels: half a byte is unused
            const auto chosen = *reinterpret_cast<const Pack<float, kQueries>*>(picked + c * p.held + q);
#pragma unroll
            for (int i = 0; i < kTokens; ++i) {
              const float y = label_of(x[i], part == 1);
#pragma unroll
              for (int j = 0; j < kQueries; ++j) sum[j][i] = fmaf(chosen.at[j], y, sum[j][i]);
            }
          }
        }
        if (p.scale) {
          // Read only now: registers are few before.
          f16 scale[kTokens < 8 ? 8 : kTokens];
          load_neighbors(p.scale + b * p.scale_batch_stride + label * p.scale_head_stride + begin, there,
                         p.scale_aligned, scale);
#pragma unroll
          for (int i = 0; i < kQueries * kTokens; ++i) sum[i / kTokens][i % kTokens] *= widen(scale[i % kTokens]);
        }
#pragma unroll
        for (int i = 0; i < kQueries * kTokens; ++i)
          best[i % kTokens] = larger_or_nan(sum[i / kTokens][i % kTokens], best[i % kTokens]);
      }
    }
  }

  float* const out = p.out + (b * p.out_heads + out_head) * p.tokens + begin;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) best[i] = begin + i < length ? best[i] : -__builtin_huge_valf();
  if (p.tokens % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kTokens; i += 4) {
      if (begin + i < p.tokens)
        *reinterpret_cast<Pack<float, 4>*>(out + i) = {{best[i], best[i + 1], best[i + 2], best[i + 3]}};
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (begin + i < p.tokens) out[i] = best[i];
  }
}

}  // namespace fastok::cuda
