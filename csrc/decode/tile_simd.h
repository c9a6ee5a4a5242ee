// The two products of decode attention for a few query rows: dot products with keys, and weighted sums of values.
// Elements are fp32, 16-bit floats, or codes of one byte. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"
#include "decode/decode.h"

namespace fastok::FASTOK_ISA {
namespace {

// Rows that are read later, fetched into the second-level cache while others are worked on, or, of one stretch, into
// the first-level cache alone: of each row what `heads` want, `bytes` each. As many lines at a time as are read, for
// more would stall, and in the order of reading: of as many rows as there are stretches what the first head wants, then
// what the next one does.
class Ahead {
 public:
  Ahead(const void* const* row, int64_t stretches, int64_t heads, int64_t head_stride, int64_t bytes)
      : row_(row), stretches_(stretches), heads_(heads), head_stride_(head_stride), bytes_(bytes) {
    begin();
  }
  // A call would cost the caller all its vector registers.
  template <int64_t kLines>
  inline __attribute__((always_inline)) void fetch() {
    const bool all = end_ - line_ >= kLines * 64;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kLines; ++i) {
      if (stretches_ == 1)
        __builtin_prefetch(line_, 0, 0);
      else
        __builtin_prefetch(line_, 0, 2);
      line_ += 64;
      if (!all && line_ >= end_) next();
    }
    if (line_ >= end_) next();
  }

 private:
  inline __attribute__((always_inline)) void begin() {
    line_ = static_cast<const char*>(row_[of_stretches_]) + head_ * head_stride_;
    end_ = line_ + bytes_;
  }
  inline __attribute__((always_inline)) void next() {
    if (++of_stretches_ == stretches_) {
      of_stretches_ = 0;
      if (++head_ == heads_) head_ = 0, row_ += stretches_;
    }
    begin();
  }

  const char *line_, *end_;
  const void* const* row_;
  int64_t stretches_, heads_, head_stride_, bytes_, of_stretches_ = 0, head_ = 0;
};
struct NothingAhead {
  template <int64_t>
  void fetch() {}
};
template <class T>
constexpr int64_t lines_of(int64_t elements) {
  return elements * int64_t(sizeof(T)) / 64;
}

// body(Rows<n>(), first) of `rows` rows, four, two and one at a time.
template <int kCount>
struct Rows {
  static constexpr int count = kCount;
};
template <class Body>
inline __attribute__((always_inline)) void by_rows(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(Rows<4>(), r);
  if (r + 2 <= rows) body(Rows<2>(), r), r += 2;
  if (r < rows) body(Rows<1>(), r);
}

// `count` elements, then zeros.
template <class T>
inline vf load_part(const T* p, int64_t count) {
  T part[kLanes] = {};
  std::memcpy(part, p, size_t(count) * sizeof(T));
  return load(part);
}

// sum[row][token] of kRows * kTokens vectors' lanes, to out[row * pitch + token].
template <int kTokens, int kRows>
inline __attribute__((always_inline)) void store_sums(const vf (&sum)[kRows][kTokens], float* out, int64_t pitch) {
#if defined(__AVX512F__)
  if constexpr (kTokens == 4) {
    vf pair[2 * kRows], quad[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kRows; ++i) {
      // By row and column: as one array of 16, or in loops that are not unrolled, the sums would live in memory.
      const vf a = sum[i / 2][i % 2 * 2], b = sum[i / 2][i % 2 * 2 + 1];
      pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
      quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const auto halves = [](vf a, vf b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    };
    const vf low = halves(quad[0], quad[kRows > 1 ? 1 : 0]), high = kRows > 2 ? halves(quad[2], quad[3]) : low;
    const vf all = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm_storeu_ps(out, _mm512_castps512_ps128(all));
    if constexpr (kRows > 1) _mm_storeu_ps(out + pitch, _mm512_extractf32x4_ps(all, 1));
    if constexpr (kRows > 2) {
      _mm_storeu_ps(out + 2 * pitch, _mm512_extractf32x4_ps(all, 2));
      _mm_storeu_ps(out + 3 * pitch, _mm512_extractf32x4_ps(all, 3));
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) out[r * pitch + t] = horizontal_sum(sum[r][t]);
}

// The products over the last channels, fewer than a vector.
template <class T>
void add_rest(const T* const* keys, int64_t n, int64_t first, const float* q, int64_t q_pitch, int64_t rows,
              int64_t channels, float* out, int64_t pitch) {
  for (int64_t t = 0; t < n; ++t) {
    const vf x = load_part(keys[t] + first, channels);
    for (int64_t r = 0; r < rows; ++r) out[r * pitch + t] += horizontal_sum(x * load_part(q + r * q_pitch, channels));
  }
}

// Not inlined, so that all its pointers have registers.
template <class T, int kTokens, int kRows, class Next>
__attribute__((noinline)) void dot_tile(const T* const* keys, int64_t first, const float* q, int64_t q_pitch,
                                        int64_t width, float* out, int64_t pitch, Next& next) {
  vf sum[kRows][kTokens];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) sum[r][t] = splat(0.0f);
  int64_t d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    next.template fetch<lines_of<T>(kTokens * 2 * kLanes)>();
    vf x[2][kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) load_pair(keys[t] + first + d, x[0][t], x[1][t]);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half)
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const vf y = load(q + r * q_pitch + d + half * kLanes);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) sum[r][t] = fma(x[half][t], y, sum[r][t]);
      }
  }
  if (d + kLanes <= width) {
    next.template fetch<lines_of<T>(kTokens * kLanes)>();
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const vf x = load(keys[t] + first + d);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r][t] = fma(x, load(q + r * q_pitch + d), sum[r][t]);
    }
    d += kLanes;
  }
  store_sums<kTokens, kRows>(sum, out, pitch);
  if (d < width) add_rest(keys, kTokens, first + d, q + d, q_pitch, kRows, width - d, out, pitch);
}

// out[row * pitch + i] = <q[row], keys[i][first ..]> over `width` channels; whole pairs of vectors of a row of q are in
// the order of load_pair.
template <class T, class Next>
void dots(const T* const* keys, int64_t n, int64_t first, const float* q, int64_t q_pitch, int64_t rows, int64_t width,
          float* out, int64_t pitch, Next& next) {
  NothingAhead nothing;
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    by_rows(rows, [&](auto some, int64_t r) {
      float* const to = out + r * pitch + i;
      if (r == 0)
        dot_tile<T, 4, some.count>(keys + i, first, q, q_pitch, width, to, pitch, next);
      else
        dot_tile<T, 4, some.count>(keys + i, first, q + r * q_pitch, q_pitch, width, to, pitch, nothing);
    });
  for (; i < n; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      float* const to = out + r * pitch + i;
      if (r == 0)
        dot_tile<T, 1, 1>(keys + i, first, q, q_pitch, width, to, pitch, next);
      else
        dot_tile<T, 1, 1>(keys + i, first, q + r * q_pitch, q_pitch, width, to, pitch, nothing);
    }
}

// Of as many lines as are read with values, one is fetched ahead before them, the others beside them.
constexpr int64_t kFetchedBefore = 8;

template <class T, int kRows, int kVectors, class Next>
inline __attribute__((always_inline)) void sum_tile(const T* const* values, int64_t n, int64_t first, const float* p,
                                                    int64_t p_pitch, float* out, int64_t pitch, Next& next) {
  vf sum[kRows][kVectors];
  constexpr int kPaired = kVectors / 2 * 2;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * pitch + v * kLanes);
#pragma GCC unroll 2
    for (int v = 0; v < kPaired; v += 2) to_pair<T>(sum[r][v], sum[r][v + 1]);
  }
  for (int64_t i = 0; i < n; ++i) {
    if (i % kFetchedBefore != 0) next.template fetch<lines_of<T>(kVectors * kLanes)>();
    vf x[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kPaired; v += 2) load_pair(values[i] + first + v * kLanes, x[v], x[v + 1]);
    if constexpr (kPaired < kVectors) x[kPaired] = load(values[i] + first + kPaired * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vf weight = splat(p[r * p_pitch + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x[v], weight, sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kPaired; v += 2) from_pair<T>(sum[r][v], sum[r][v + 1]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * pitch + v * kLanes, sum[r][v]);
  }
}

template <class T>
inline void sum_part(const T* const* values, int64_t n, int64_t first, int64_t count, const float* p, float* out) {
  vf sum = load_part(out, count);
  for (int64_t i = 0; i < n; ++i) sum = fma(load_part(values[i] + first, count), splat(p[i]), sum);
  float lane[kLanes];
  store(lane, sum);
  std::memcpy(out, lane, size_t(count) * sizeof(float));
}

// out[row * pitch + d] += sum over i of p[row * p_pitch + i] * values[i][first + d], for d < width, i ascending.
template <class T, int kRows, class Next>
void weighted_rows(const T* const* values, int64_t n, int64_t first, const float* p, int64_t p_pitch, int64_t width,
                   float* out, int64_t pitch, Next& next) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= width; d += 4 * kLanes)
    sum_tile<T, kRows, 4>(values, n, first + d, p, p_pitch, out + d, pitch, next);
  for (; d + kLanes <= width; d += kLanes)
    sum_tile<T, kRows, 1>(values, n, first + d, p, p_pitch, out + d, pitch, next);
  for (int64_t row = 0; row < kRows && d < width; ++row)
    sum_part(values, n, first + d, width - d, p + row * p_pitch, out + row * pitch + d);
}

template <class T, class Next>
void weighted_sum(const T* const* values, int64_t n, int64_t first, const float* p, int64_t p_pitch, int64_t rows,
                  int64_t width, float* out, int64_t pitch, Next& next) {
  NothingAhead nothing;
  by_rows(rows, [&](auto some, int64_t r) {
    if (r == 0)
      weighted_rows<T, some.count>(values, n, first, p, p_pitch, width, out, pitch, next);
    else
      weighted_rows<T, some.count>(values, n, first, p + r * p_pitch, p_pitch, width, out + r * pitch, pitch, nothing);
  });
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
