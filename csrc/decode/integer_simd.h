// The two products of decode attention with codes as they are: queries and weights become integers of 16 bits, relative
// to the largest of a row, so a product errs by no more than 1/65,278 of that times the sum of the codes. Sums of
// integers are exact, and the same on every instruction set. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "decode/tile_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr int64_t kIntegerPitch = 32;  // rows of integers are padded with zeros to a multiple of this

#if defined(__AVX2__)
constexpr bool kIntegers = true;
#if defined(__AVX512F__)
constexpr int kWords = 32, kDotTokens = 4;  // of 16 bits in a vector
inline vi load_words(const int16_t* p) { return _mm512_loadu_si512(p); }
inline vi load_codes(const uint8_t* p) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vi zero_words() { return _mm512_setzero_si512(); }
// sum += a * b of neighbouring pairs.
inline vi add_products(vi sum, vi a, vi b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}
inline vi mingle_low(vi a, vi b) { return _mm512_unpacklo_epi16(a, b); }
inline vi mingle_high(vi a, vi b) { return _mm512_unpackhi_epi16(a, b); }
inline vf to_float(vi x) { return _mm512_cvtepi32_ps(x); }
// Sums of mingled words in the order of the words.
inline void in_order(vi low, vi high, vf (&out)[2]) {
  const vi first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const vi second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  out[0] = to_float(_mm512_permutex2var_epi32(low, first, high));
  out[1] = to_float(_mm512_permutex2var_epi32(low, second, high));
}
inline void store_rounded(int16_t* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}
inline int32_t sum_of(vi x) { return _mm512_reduce_add_epi32(x); }
#else
constexpr int kWords = 16, kDotTokens = 2;
inline vi load_words(const int16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline vi load_codes(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vi zero_words() { return _mm256_setzero_si256(); }
inline vi add_products(vi sum, vi a, vi b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
inline vi mingle_low(vi a, vi b) { return _mm256_unpacklo_epi16(a, b); }
inline vi mingle_high(vi a, vi b) { return _mm256_unpackhi_epi16(a, b); }
inline void in_order(vi low, vi high, vf (&out)[2]) {
  out[0] = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(low, high, 0x20));
  out[1] = _mm256_cvtepi32_ps(_mm256_permute2x128_si256(low, high, 0x31));
}
inline void store_rounded(int16_t* p, vf x) {
  const vi words = _mm256_cvtps_epi32(x);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline int32_t sum_of(vi x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
#endif

// The most that two bytes with a sign make, 256 * high + low.
constexpr float kMostInteger = 127 * 256 + 127;

// What numbers up to a magnitude are to be multiplied by, and what an integer stands for: NaN if one is not finite.
struct IntegerScale {
  float inverse, step;

  explicit IntegerScale(float largest) {
    // Of subnormal numbers the reciprocal would overflow: they are 0 beside the zeros that they are added to.
    const bool tiny = largest < 0x1p-100f;
    inverse = tiny ? 0.0f : kMostInteger / largest;
    step = tiny ? 0.0f : largest * (1.0f / kMostInteger) + (largest - largest);
  }
  explicit operator bool() const { return step == step; }
};

// x[0 .. n) as integers, zeros behind them up to kIntegerPitch.
inline void to_integers(const float* x, int64_t n, const IntegerScale& scale, int16_t* out) {
  const vf inverse = splat(scale.inverse);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_rounded(out + i, load(x + i) * inverse);
  if (i < n) store_rounded(out + i, load_part(x + i, n - i) * inverse), i += kLanes;
  for (; i % kIntegerPitch; i += kLanes) store_rounded(out + i, splat(0.0f));
}

template <int kTokens, int kRows>
inline __attribute__((always_inline)) void integer_dot_tile(const uint8_t* const* keys, int64_t first, const int16_t* q,
                                                            int64_t q_pitch, int64_t width, float* out, int64_t pitch) {
  vi sum[kRows * kTokens];
#pragma GCC unroll 16
  for (int i = 0; i < kRows * kTokens; ++i) sum[i] = zero_words();
  for (int64_t d = 0; d < width; d += kWords) {
    vi x[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) x[t] = load_codes(keys[t] + first + d);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const vi y = load_words(q + r * q_pitch + d);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) sum[r * kTokens + t] = add_products(sum[r * kTokens + t], x[t], y);
    }
  }
#if defined(__AVX512F__)
  if constexpr (kTokens == 4 && kRows == 4) {
    vf bits[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) bits[i] = _mm512_castsi512_ps(sum[i]);
    const vf all = to_float(_mm512_castps_si512(horizontal(bits, [](vf a, vf b) {
      return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
    })));
    _mm_storeu_ps(out, _mm512_castps512_ps128(all));
    _mm_storeu_ps(out + pitch, _mm512_extractf32x4_ps(all, 1));
    _mm_storeu_ps(out + 2 * pitch, _mm512_extractf32x4_ps(all, 2));
    _mm_storeu_ps(out + 3 * pitch, _mm512_extractf32x4_ps(all, 3));
    return;
  }
#endif
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) out[r * pitch + t] = float(sum_of(sum[r * kTokens + t]));
}

// out[row * pitch + i] = <q[row], keys[i][first ..]> over `width` channels; q is 0 behind them.
inline void integer_dots(const uint8_t* const* keys, int64_t n, int64_t first, const int16_t* q, int64_t q_pitch,
                         int64_t rows, int64_t width, float* out, int64_t pitch) {
  by_rows(rows, [&](auto some, int64_t r) {
    const int16_t* const of_rows = q + r * q_pitch;
    int64_t i = 0;
    for (; i + kDotTokens <= n; i += kDotTokens)
      integer_dot_tile<kDotTokens, some.count>(keys + i, first, of_rows, q_pitch, width, out + r * pitch + i, pitch);
    for (; i < n; ++i)
      integer_dot_tile<1, some.count>(keys + i, first, of_rows, q_pitch, width, out + r * pitch + i, pitch);
  });
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void integer_sum_tile(const uint8_t* const* values, int64_t n, int64_t first,
                                                            const int16_t* p, int64_t p_pitch, const float* step,
                                                            int64_t width, float* out, int64_t pitch) {
  vi sum[kRows][2 * kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 2 * kVectors; ++v) sum[r][v] = zero_words();
  for (int64_t i = 0; i < n; i += 2) {
    const uint8_t *const even = values[i] + first, *const odd = values[i + 1 < n ? i + 1 : i] + first;
    vi x[2 * kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const vi a = load_codes(even + v * kWords), b = load_codes(odd + v * kWords);
      x[2 * v] = mingle_low(a, b);
      x[2 * v + 1] = mingle_high(a, b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int32_t both;
      std::memcpy(&both, p + r * p_pitch + i, sizeof both);
      const vi weights = splat(both);
#pragma GCC unroll 4
      for (int v = 0; v < 2 * kVectors; ++v) sum[r][v] = add_products(sum[r][v], x[v], weights);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const vf unit = splat(step[r]);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      vf y[2];
      in_order(sum[r][2 * v], sum[r][2 * v + 1], y);
      float* const to = out + r * pitch + v * kWords;
      const int64_t left = width - v * kWords;
      if (left >= kWords) {
        store(to, fma(y[0], unit, load(to)));
        store(to + kLanes, fma(y[1], unit, load(to + kLanes)));
        continue;
      }
      float lane[kWords];
      store(lane, y[0] * unit);
      store(lane + kLanes, y[1] * unit);
      for (int64_t d = 0; d < left; ++d) to[d] += lane[d];
    }
  }
}

// out[row * pitch + d] += step[row] * sum over i of p[row * p_pitch + i] * values[i][first + d], for d < width. p is 0
// behind n.
inline void integer_sums(const uint8_t* const* values, int64_t n, int64_t first, const int16_t* p, int64_t p_pitch,
                         const float* step, int64_t rows, int64_t width, float* out, int64_t pitch) {
  for (int64_t d = 0; d < width; d += kWords)
    by_rows(rows, [&](auto some, int64_t r) {
      integer_sum_tile<some.count, 1>(values, n, first + d, p + r * p_pitch, p_pitch, step + r, width - d,
                                      out + r * pitch + d, pitch);
    });
}
#else
constexpr bool kIntegers = false;
struct IntegerScale {
  float step = 0;

  explicit IntegerScale(float) {}
  explicit operator bool() const { return false; }
};
// Never called.
inline void to_integers(const float*, int64_t, const IntegerScale&, int16_t*) {}
inline void integer_dots(const uint8_t* const*, int64_t, int64_t, const int16_t*, int64_t, int64_t, int64_t, float*,
                         int64_t) {}
inline void integer_sums(const uint8_t* const*, int64_t, int64_t, const int16_t*, int64_t, const float*, int64_t,
                         int64_t, float*, int64_t) {}
#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA
