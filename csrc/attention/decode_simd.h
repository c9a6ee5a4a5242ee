// Attention of few rows, as when decoding: bound by reading the keys and values, which is done once, where they lie,
// for all query heads that share them. A block of keys at a time is widened to fp32 in the first-level cache; what is
// done with it there knows nothing of how keys are stored.
#pragma once
#include "attention/fp32_simd.h"
#include "attention/softmax_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// A block of keys or values in fp32: rows `stride` apart, of whole vectors, zeros behind the width.
struct WideRows {
  const float* data;
  int64_t stride;
};

// What the next block will read: fetched row by row while this one is worked on, more than that would stall.
struct Ahead {
  const char* data;
  int64_t stride, row_bytes, rows;

  Ahead(const HeadRows& x, int64_t begin, int64_t end)
      : data(static_cast<const char*>(x.data) + begin * x.stride * x.element_bytes),
        stride(x.stride * x.element_bytes),
        row_bytes(x.width * x.element_bytes),
        rows(end - begin) {}
  void fetch(int64_t row) const {
    for (int64_t byte = 0; byte < row_bytes && row < rows; byte += 64) __builtin_prefetch(data + row * stride + byte);
  }
};

struct Decode {
  static constexpr int kRows = 64, kKeys = 32;
  // Sums that a tile of rows and keys holds in registers.
#if defined(__AVX512F__)
  static constexpr int kSums = 16, kTileRows = 4;
#else
  static constexpr int kSums = 8, kTileRows = 2;
#endif
  static constexpr int64_t kMostWidth = 256;

  float q[kRows * kMostWidth], out[kRows * kMostWidth];  // [row][padded width]
  float wide[kKeys * kMostWidth];                        // a block of keys, then of values
  float scores[kRows * kKeys];
  Running<kRows> running;

  static constexpr size_t scratch_bytes() { return sizeof(Decode); }
  static int64_t padded(int64_t width) { return round_up(width, kLanes); }

  // Keys or values [begin, begin + count) of a head.
  template <class T>
  static void widen_block(const HeadRows& x, int64_t begin, int64_t count, float* to) {
    const int64_t width = padded(x.width), whole = x.width / kLanes * kLanes;
    const T* from = static_cast<const T*>(x.data) + begin * x.stride;
    for (int64_t j = 0; j < count; ++j, from += x.stride, to += width) {
      for (int64_t d = 0; d < whole; d += kLanes) store(to + d, load(from + d));
      for (int64_t d = whole; d < width; ++d) to[d] = d < x.width ? widen(from[d]) : 0.0f;
    }
    std::memset(to, 0, size_t((kKeys - count) * width) * sizeof(float));
  }
  static WideRows widen_block(const HeadRows& x, Dtype dtype, int64_t begin, int64_t count, float* to) {
    if (dtype == Dtype::f32 && count == kKeys && x.width % kLanes == 0)
      return {static_cast<const float*>(x.data) + begin * x.stride, x.stride};
    if (dtype == Dtype::f16) {
      widen_block<f16>(x, begin, count, to);
    } else if (dtype == Dtype::bf16) {
      widen_block<bf16>(x, begin, count, to);
    } else {
      widen_block<float>(x, begin, count, to);
    }
    return {to, padded(x.width)};
  }

  // scores[row][key] of `rows` rows from `first` on.
  template <int rows>
  void multiply_tile(int64_t first, const WideRows& k, int64_t width, const Ahead& ahead) {
    constexpr int keys = kSums / rows;
    const float* const a = q + first * width;
    for (int64_t key = 0; key < kKeys; key += keys) {
      const float* const b = k.data + key * k.stride;
      for (int j = 0; j < keys && first == 0; ++j) ahead.fetch(key + j);
      vf sum[kSums];
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) sum[i] = splat(0.0f);
      for (int64_t d = 0; d < width; d += kLanes) {
#pragma GCC unroll 16
        for (int j = 0; j < keys; ++j) {
          const vf x = load(b + j * k.stride + d);
#pragma GCC unroll 4
          for (int i = 0; i < rows; ++i) sum[i * keys + j] = fma(load(a + i * width + d), x, sum[i * keys + j]);
        }
      }
      float total[kSums];
#if defined(__AVX512F__)
      store(total, horizontal_sum(sum));
#else
      for (int i = 0; i < kSums; ++i) total[i] = horizontal_sum(sum[i]);
#endif
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i)
        std::memcpy(scores + (first + i) * kKeys + key, total + i * keys, keys * sizeof(float));
    }
  }
  void multiply(int64_t rows, const WideRows& k, int64_t width, const Ahead& ahead) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) multiply_tile<kTileRows>(i, k, width, ahead);
    for (; i < rows; ++i) multiply_tile<1>(i, k, width, ahead);
  }

  // out[row][channel] += weight[row][key] * v[key][channel] of `vectors` vectors of channels from `c` on.
  template <int rows, int vectors>
  void add_values_tile(int64_t first, const WideRows& v, int64_t n_keys, int64_t width, int64_t c, const Ahead& ahead) {
    vf sum[rows][vectors];
    float* const to = out + first * width + c;
    const float* const weight = scores + first * kKeys;
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int x = 0; x < vectors; ++x) sum[i][x] = load(to + i * width + x * kLanes);
    for (int64_t j = 0; j < n_keys; ++j) {
      const float* const row = v.data + j * v.stride + c;
      if (first == 0 && c == 0) ahead.fetch(j);
#pragma GCC unroll 4
      for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
        for (int x = 0; x < vectors; ++x)
          sum[i][x] = fma(splat(weight[i * kKeys + j]), load(row + x * kLanes), sum[i][x]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int x = 0; x < vectors; ++x) store(to + i * width + x * kLanes, sum[i][x]);
  }
  template <int rows>
  void add_values(int64_t first, const WideRows& v, int64_t n_keys, int64_t width, const Ahead& ahead) {
    int64_t c = 0;
    for (; c + 4 * kLanes <= width; c += 4 * kLanes) add_values_tile<rows, 4>(first, v, n_keys, width, c, ahead);
    for (; c < width; c += kLanes) add_values_tile<rows, 1>(first, v, n_keys, width, c, ahead);
  }
  void add_values(int64_t rows, const WideRows& v, int64_t n_keys, int64_t width, const Ahead& ahead) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) add_values<kTileRows>(i, v, n_keys, width, ahead);
    for (; i < rows; ++i) add_values<1>(i, v, n_keys, width, ahead);
  }

  // Rows of the heads, scaled; nothing seen so far.
  void begin(const AttentionHead* heads, int64_t n_heads) {
    const int64_t n_q = heads->q.count, width = padded(heads->q.width);
    for (int64_t r = 0; r < n_heads * n_q; ++r) {
      const AttentionHead& head = heads[r / n_q];
      widen_row(head.q, head.dtype, r % n_q, head.scale, q + r * width);
      for (int64_t d = head.q.width; d < width; ++d) q[r * width + d] = 0;
    }
    std::memset(out, 0, size_t(n_heads * n_q * padded(heads->v.width)) * sizeof(float));
    running = Running<kRows>();
  }
  // Up to kKeys keys from `first` on, of which the scores are there.
  void attend(const AttentionHead* heads, int64_t n_heads, int64_t first, int64_t end, const WideRows& v,
              const Ahead& ahead) {
    const int64_t n_q = heads->q.count, rows = n_heads * n_q, width = padded(heads->v.width);
    if (touches<Fp32>(*heads) || first < heads->first_key(n_q - 1) || end > heads->last_key(0) || end - first < kKeys)
      for (int64_t r = 0; r < rows; ++r)
        finish_logits<Fp32>(heads[r / n_q], r % n_q, first, end, kKeys, scores + r * kKeys);
    peaks_of(scores, kKeys, rows, kKeys, running.here);
    const bool shrinks = running.advance(rows, 1.0f);
    for (int64_t r = 0; r < rows; ++r) {
      float* const x = scores + r * kKeys;
      const float shrink = running.shrink[r];
      const vf sum = exponentials(x, kKeys, 1.0f, running.shift[r], x);
      store(running.total[r], fma(load(running.total[r]), splat(shrink), sum));
      for (int64_t c = 0; c < width && shrinks; c += kLanes)
        store(out + r * width + c, load(out + r * width + c) * splat(shrink));
    }
    add_values(rows, v, end - first, width, ahead);
  }
  void finish(int64_t rows, int64_t v_width, float* to, float* lse) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float total = horizontal_sum(load(running.total[r]));
      lse[r] = total == 0 ? -kInfinity : running.peak[r] + __builtin_logf(total);
      write_row(out + r * padded(v_width), total == 0 ? 0.0f : 1.0f / total, v_width, to + r * v_width);
    }
  }
};

void decode(const AttentionHead* heads, int64_t n_heads, int64_t key_begin, int64_t key_end, float* out, float* lse,
            void* memory) {
  Decode& d = *static_cast<Decode*>(memory);
  const AttentionHead& head = *heads;
  const int64_t n_q = head.q.count;
  d.begin(heads, n_heads);
  const int64_t first = head.first_key(0) > key_begin ? head.first_key(0) : key_begin;
  const int64_t last = head.last_key(n_q - 1) < key_end ? head.last_key(n_q - 1) : key_end;
  for (int64_t row = 0; row < Decode::kKeys; ++row) {
    Ahead(head.k, first, last).fetch(row);
    Ahead(head.v, first, last).fetch(row);
  }
  for (int64_t j = first; j < last; j += Decode::kKeys) {
    const int64_t n = last - j < Decode::kKeys ? last - j : Decode::kKeys;
    const int64_t next = j + Decode::kKeys < last ? j + Decode::kKeys : last;
    const int64_t after = next + Decode::kKeys < last ? next + Decode::kKeys : last;
    d.multiply(n_heads * n_q, Decode::widen_block(head.k, head.dtype, j, n, d.wide), Decode::padded(head.k.width),
               Ahead(head.k, next, after));
    d.attend(heads, n_heads, j, j + n, Decode::widen_block(head.v, head.dtype, j, n, d.wide),
             Ahead(head.v, next, after));
  }
  d.finish(n_heads * n_q, head.v.width, out, lse);
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
