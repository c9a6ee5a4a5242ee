// The two products of decode attention for a few query rows: dot products with keys, and weighted sums of values.
// Elements are fp32, 16-bit floats, or codes of one byte. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr int64_t kRowsAhead = 16;  // token rows lie a page apart, more than the hardware foresees

// `count` elements, then zeros.
template <class T>
inline vf load_part(const T* p, int64_t count) {
  T part[kLanes] = {};
  std::memcpy(part, p, size_t(count) * sizeof(T));
  return load(part);
}

template <class T>
inline void prefetch_row(const T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + d);
}

// sum[row][token] of kRows * kTokens vectors' lanes, to out[row * pitch + token].
template <int kTokens, int kRows>
inline __attribute__((always_inline)) void store_sums(const vf (&sum)[kRows][kTokens], float* out, int64_t pitch) {
#if defined(__AVX512F__)
  if constexpr (kTokens == 4 && kRows == 4) {
    vf pair[8], quad[4];
    const vf* const s = &sum[0][0];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
      quad[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const vf low =
        _mm512_add_ps(_mm512_shuffle_f32x4(quad[0], quad[1], 0x44), _mm512_shuffle_f32x4(quad[0], quad[1], 0xee));
    const vf high =
        _mm512_add_ps(_mm512_shuffle_f32x4(quad[2], quad[3], 0x44), _mm512_shuffle_f32x4(quad[2], quad[3], 0xee));
    const vf all = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
    _mm_storeu_ps(out, _mm512_castps512_ps128(all));
    _mm_storeu_ps(out + pitch, _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(out + 2 * pitch, _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(out + 3 * pitch, _mm512_extractf32x4_ps(all, 3));
    return;
  }
#endif
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[r * pitch + t] = horizontal_sum(sum[r][t]);
}

template <class T, int kTokens, int kRows>
inline __attribute__((always_inline)) void dot_tile(const T* const* keys, int64_t first, const float* q,
                                                    int64_t q_pitch, int64_t width, float* out, int64_t pitch) {
  vf sum[kRows][kTokens];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) sum[r][t] = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    vf x[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) x[t] = load(keys[t] + first + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vf y = load(q + r * q_pitch + d);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sum[r][t] = fma(x[t], y, sum[r][t]);
    }
  }
  if (d < width) {
    for (int t = 0; t < kTokens; ++t) {
      const vf x = load_part(keys[t] + first + d, width - d);
      for (int r = 0; r < kRows; ++r) sum[r][t] = fma(x, load_part(q + r * q_pitch + d, width - d), sum[r][t]);
    }
  }
  store_sums<kTokens, kRows>(sum, out, pitch);
}

// out[row * pitch + i] = <q[row], keys[i][first ..]> over `width` channels.
template <class T, bool kPrefetch>
void dots(const T* const* keys, int64_t n, int64_t first, const float* q, int64_t q_pitch, int64_t rows, int64_t width,
          float* out, int64_t pitch, int64_t n_behind = 0) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    if constexpr (kPrefetch)
      for (int64_t t = i + kRowsAhead; t < i + kRowsAhead + 4 && t < n + n_behind; ++t)
        prefetch_row(keys[t] + first, width);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
      dot_tile<T, 4, 4>(keys + i, first, q + r * q_pitch, q_pitch, width, out + r * pitch + i, pitch);
    for (; r < rows; ++r)
      dot_tile<T, 4, 1>(keys + i, first, q + r * q_pitch, q_pitch, width, out + r * pitch + i, pitch);
  }
  for (; i < n; ++i)
    for (int64_t r = 0; r < rows; ++r)
      dot_tile<T, 1, 1>(keys + i, first, q + r * q_pitch, q_pitch, width, out + r * pitch + i, pitch);
}

template <class T, int kRows, int kVectors>
inline __attribute__((always_inline)) void sum_tile(const T* const* values, int64_t n, int64_t first, const float* p,
                                                    int64_t p_pitch, float* out, int64_t pitch) {
  vf sum[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(out + r * pitch + v * kLanes);
  for (int64_t i = 0; i < n; ++i) {
    vf x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load(values[i] + first + v * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vf weight = splat(p[r * p_pitch + i]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x[v], weight, sum[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * pitch + v * kLanes, sum[r][v]);
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
template <class T>
void weighted_sum(const T* const* values, int64_t n, int64_t first, const float* p, int64_t p_pitch, int64_t rows,
                  int64_t width, float* out, int64_t pitch) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const float* const weights = p + r * p_pitch;
    float* const to = out + r * pitch;
    int64_t d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes)
      sum_tile<T, 4, 4>(values, n, first + d, weights, p_pitch, to + d, pitch);
    for (; d + kLanes <= width; d += kLanes) sum_tile<T, 4, 1>(values, n, first + d, weights, p_pitch, to + d, pitch);
    for (int64_t row = 0; row < 4 && d < width; ++row)
      sum_part(values, n, first + d, width - d, weights + row * p_pitch, to + row * pitch + d);
  }
  for (; r < rows; ++r) {
    const float* const weights = p + r * p_pitch;
    float* const to = out + r * pitch;
    int64_t d = 0;
    for (; d + 4 * kLanes <= width; d += 4 * kLanes)
      sum_tile<T, 1, 4>(values, n, first + d, weights, p_pitch, to + d, pitch);
    for (; d + kLanes <= width; d += kLanes) sum_tile<T, 1, 1>(values, n, first + d, weights, p_pitch, to + d, pitch);
    if (d < width) sum_part(values, n, first + d, width - d, weights, to + d);
  }
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
