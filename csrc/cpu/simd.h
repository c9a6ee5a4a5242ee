// fp32 vectors of the instruction set this file is compiled for, and conversions from and to the storage types.
// See cpu/dispatch.h for the rule about linkage; everything here is in namespace fastok::<isa>.
#pragma once
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef FASTOK_ISA
#error "FASTOK_ISA names the instruction set (CMakeLists.txt)"
#endif

namespace fastok::FASTOK_ISA {

#if defined(__AVX512F__)

inline constexpr int kLanes = 16;
using vf = __m512;
using vi = __m512i;
using vmask = __mmask16;
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline vf load(const bf16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline vf load(const f16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline vf load(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline void store(f16* p, vf x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Rounded to nearest even.
inline void store_by_hand(bf16* p, vf x) {
  const vi bits = _mm512_castps_si512(x);
  const vi odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const vi rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const vi quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const vmask nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const vi out = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
#if defined(__AVX512BF16__)
// The same by the machine, which makes subnormal numbers 0: these by hand.
inline bool any_subnormal(vf x) { return __builtin_expect(_mm512_fpclass_ps_mask(x, 0x20) != 0, 0); }
inline void store(bf16* p, vf x) {
  if (any_subnormal(x)) return store_by_hand(p, x);
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &rounded, sizeof rounded);
}
inline void store_flushed(bf16* p, vf x, vf y) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(y, x);
  std::memcpy(p, &rounded, sizeof rounded);
}
inline void store(bf16* p, vf x, vf y) {
  if (!any_subnormal(x) && !any_subnormal(y)) return store_flushed(p, x, y);
  store_by_hand(p, x);
  store_by_hand(p + kLanes, y);
}
#else
inline void store(bf16* p, vf x) { store_by_hand(p, x); }
#endif
inline vf splat(float x) { return _mm512_set1_ps(x); }
inline vi splat(int32_t x) { return _mm512_set1_epi32(x); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf absolute(vf x) { return _mm512_abs_ps(x); }
inline vf maximum(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vmask greater(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline vmask unordered(vf a, vf b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q); }
inline vmask unordered(vf a) { return unordered(a, a); }
inline vmask either(vmask a, vmask b) { return a | b; }
inline bool any(vmask m) { return m != 0; }
inline vf select(vmask m, vf a, vf b) { return _mm512_mask_mov_ps(b, m, a); }
inline vi select(vmask m, vi a, vi b) { return _mm512_mask_mov_epi32(b, m, a); }
inline vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi maximum(vi a, vi b) { return _mm512_max_epi32(a, b); }
inline vi as_bits(vf x) { return _mm512_castps_si512(x); }
inline void store(int32_t* p, vi x) { _mm512_storeu_si512(p, x); }
inline vi load(const int32_t* p) { return _mm512_loadu_si512(p); }
// Every other lane of a, then of b.
inline void unzip(vf a, vf b, vf& even, vf& odd) {
  const vi places = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, places, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(places, _mm512_set1_epi32(1)), b);
}
// The inverse.
inline void zip(vf even, vf odd, vf& a, vf& b) {
  const vi places = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = _mm512_permutex2var_ps(even, places, odd);
  b = _mm512_permutex2var_ps(even, _mm512_add_epi32(places, _mm512_set1_epi32(8)), odd);
}
// Two vectors of neighbouring elements, in whichever order the type unpacks best: here the even places and the odd
// ones.
inline void load_pair(const bf16* p, vf& even, vf& odd) {
  const vi words = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int32_t(0xffff0000))));
}
inline void store_pair(bf16* p, vf even, vf odd) {
  const auto rounded = [](vf x) {
    const vi bits = _mm512_castps_si512(x);
    const vmask up = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const vi half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(half, up, half, _mm512_set1_epi32(1));
  };
  const auto quieted = [](vf x, vi out) {
    return _mm512_mask_or_epi32(out, unordered(x), _mm512_castps_si512(x), _mm512_set1_epi32(0x400000));
  };
  vi low = rounded(even), high = rounded(odd);
  if (__builtin_expect(_mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q) != 0, 0)) {
    low = quieted(even, low);
    high = quieted(odd, high);
  }
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high));
}

#elif defined(__AVX2__)

inline constexpr int kLanes = 8;
using vf = __m256;
using vi = __m256i;
using vmask = __m256;
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline vf load(const bf16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline vf load(const f16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline vf load(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline void store(f16* p, vf x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store(bf16* p, vf x) {
  const vi bits = _mm256_castps_si256(x);
  const vi odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const vi rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const vi quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const vi nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const vi out = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const vi packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline vf splat(float x) { return _mm256_set1_ps(x); }
inline vi splat(int32_t x) { return _mm256_set1_epi32(x); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf absolute(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline vf maximum(vf a, vf b) { return _mm256_max_ps(a, b); }
inline vmask greater(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline vmask unordered(vf a, vf b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); }
inline vmask unordered(vf a) { return unordered(a, a); }
inline vmask either(vmask a, vmask b) { return _mm256_or_ps(a, b); }
inline bool any(vmask m) { return _mm256_movemask_ps(m) != 0; }
inline vf select(vmask m, vf a, vf b) { return _mm256_blendv_ps(b, a, m); }
inline vi select(vmask m, vi a, vi b) { return _mm256_blendv_epi8(b, a, _mm256_castps_si256(m)); }
inline vi add(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi maximum(vi a, vi b) { return _mm256_max_epi32(a, b); }
inline vi as_bits(vf x) { return _mm256_castps_si256(x); }
inline void store(int32_t* p, vi x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline vi load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
// Every other lane of a, then of b.
inline void unzip(vf a, vf b, vf& even, vf& odd) {
  const auto in_order = [](vf x) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), _MM_SHUFFLE(3, 1, 2, 0)));
  };
  even = in_order(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)));
  odd = in_order(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
}
// The inverse.
inline void zip(vf even, vf odd, vf& a, vf& b) {
  const vf low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  a = _mm256_permute2f128_ps(low, high, 0x20);
  b = _mm256_permute2f128_ps(low, high, 0x31);
}
// Two vectors of neighbouring elements, in whichever order the type unpacks best: here the even places and the odd
// ones.
inline void load_pair(const bf16* p, vf& even, vf& odd) {
  const vi words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int32_t(0xffff0000))));
}
inline void store_pair(bf16* p, vf even, vf odd) {
  const auto rounded = [](vf x) {
    const vi bits = _mm256_castps_si256(x);
    const vi up = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const vi out = _mm256_add_epi32(bits, _mm256_add_epi32(up, _mm256_set1_epi32(0x7fff)));
    const vi quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(out, quiet, _mm256_castps_si256(unordered(x)));
  };
  const vi out = _mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), out);
}

#else  // 128-bit vectors in the compiler's own notation: SSE2, NEON, anything.

inline constexpr int kLanes = 4;
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
using vmask = vi;
inline vf load(const float* p) {
  vf x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline vf load(const uint8_t* p) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
inline vf splat(float x) { return vf{x, x, x, x}; }
inline vi splat(int32_t x) { return vi{x, x, x, x}; }
#if defined(__aarch64__)
inline vf fma(vf a, vf b, vf c) {
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
}
#else
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif
inline vmask greater(vf a, vf b) { return a > b; }
inline vmask unordered(vf a) { return a != a; }
inline vmask unordered(vf a, vf b) { return unordered(a) | unordered(b); }
inline vmask either(vmask a, vmask b) { return a | b; }
inline bool any(vmask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }
inline vf select(vmask m, vf a, vf b) { return m ? a : b; }
inline vi select(vmask m, vi a, vi b) { return m ? a : b; }
inline vf absolute(vf x) { return select(x < 0, -x, x); }
inline vf maximum(vf a, vf b) { return select(a > b, a, b); }
inline vi add(vi a, vi b) { return a + b; }
inline vi maximum(vi a, vi b) { return select(a > b, a, b); }
inline vi as_bits(vf x) {
  vi bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline void store(int32_t* p, vi x) { std::memcpy(p, &x, sizeof x); }
inline vi load(const int32_t* p) {
  vi x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
// Every other lane of a, then of b.
inline void unzip(vf a, vf b, vf& even, vf& odd) {
  even = vf{a[0], a[2], b[0], b[2]};
  odd = vf{a[1], a[3], b[1], b[3]};
}

#endif

// fp64 is for gradient checks, not for speed: one lane.
inline double load(const double* p) { return *p; }
inline void store(double* p, double x) { *p = x; }
inline double fma(double a, double b, double c) { return a * b + c; }
inline bool greater(double a, double b) { return a > b; }
inline bool unordered(double a) { return a != a; }
inline bool either(bool a, bool b) { return a || b; }
inline double select(bool m, double a, double b) { return m ? a : b; }

// Ordered as magnitudes are; infinity is above all others, and NaN above that.
inline vi magnitude_bits(vf x) { return as_bits(absolute(x)); }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
inline float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  return float_of(bits_of(float_of(magnitude << 13) * 0x1p112f) | sign);
}

inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, bf16& out) {
  const uint32_t bits = bits_of(x);
  out.bits = uint16_t((x != x ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void narrow(float x, f16& out) {
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) {  // too large, inf or NaN
    magnitude = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let an addition round
    magnitude = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    magnitude = (magnitude + 0xc8000fff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(sign | magnitude);
}

#if !defined(__AVX2__)
template <class T>
inline vf load(const T* p) {
  return vf{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
template <class T>
inline void store(T* p, vf x) {
  for (int i = 0; i < kLanes; ++i) narrow(x[i], p[i]);
}
#endif

// In order, for types without a way of their own.
template <class T>
inline void load_pair(const T* p, vf& first, vf& second) {
  first = load(p);
  second = load(p + kLanes);
}
template <class T>
inline void store_pair(T* p, vf first, vf second) {
  store(p, first);
  store(p + kLanes, second);
}
// Two vectors of fp32 in order, from and to the order in which load_pair takes those of T.
template <class T>
inline void to_pair(vf&, vf&) {}
template <class T>
inline void from_pair(vf&, vf&) {}
#if defined(__AVX2__)
template <>
inline void to_pair<bf16>(vf& a, vf& b) {
  unzip(a, b, a, b);
}
template <>
inline void from_pair<bf16>(vf& a, vf& b) {
  zip(a, b, a, b);
}
#endif
inline void load_pair(const double* p, double& first, double& second) {
  first = p[0];
  second = p[1];
}
inline void store_pair(double* p, double first, double second) {
  p[0] = first;
  p[1] = second;
}

#if defined(__AVX512F__)
// In the same order as below.
inline float horizontal_sum(vf x) { return _mm512_reduce_add_ps(x); }
inline float horizontal_max(vf x) { return _mm512_reduce_max_ps(x); }
inline int32_t horizontal_max(vi x) { return _mm512_reduce_max_epi32(x); }
// All lanes of each of four vectors combined, in the order of the vectors, in every quarter of the result.
template <class Combine>
inline __attribute__((always_inline)) vf horizontal(const vf (&x)[4], Combine combine) {
  const vf a = combine(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const vf b = combine(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d p = _mm512_castps_pd(a), q = _mm512_castps_pd(b);
  const vf c = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  const vf d = combine(c, _mm512_shuffle_f32x4(c, c, 0x4e));
  return combine(d, _mm512_shuffle_f32x4(d, d, 0xb1));
}
inline void horizontal_sums(const vf (&x)[4], float* out) {
  _mm_storeu_ps(out, _mm512_castps512_ps128(horizontal(x, [](vf a, vf b) { return a + b; })));
}
inline void horizontal_maxima(const vi (&x)[4], int32_t* out) {
  vf bits[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) bits[i] = _mm512_castsi512_ps(x[i]);
  const vf best = horizontal(bits, [](vf a, vf b) { return _mm512_castsi512_ps(maximum(as_bits(a), as_bits(b))); });
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_castsi512_si128(as_bits(best)));
}
// All lanes of each vector combined, in the order of the vectors.
template <class Combine>
inline __attribute__((always_inline)) vf horizontal(vf (&x)[16], Combine combine) {
  const auto halves = [&](vf a, vf b) {
    const __m512d p = _mm512_castps_pd(a), q = _mm512_castps_pd(b);
    return combine(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  };
  const auto quarters = [&](vf a, vf b) {
    return combine(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    x[i] = combine(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) x[i] = halves(x[2 * i], x[2 * i + 1]);
  return quarters(quarters(x[0], x[1]), quarters(x[2], x[3]));
}
inline vf horizontal_max(vf (&x)[16]) {
  return horizontal(x, [](vf a, vf b) { return maximum(a, b); });
}
inline vf horizontal_sum(vf (&x)[16]) {
  return horizontal(x, [](vf a, vf b) { return a + b; });
}
#else
inline float horizontal_sum(vf x) {
  float lane[kLanes];
  store(lane, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
template <class Scalar, class Vector>
inline Scalar best_lane(Vector x) {
  Scalar lane[kLanes];
  store(lane, x);
  Scalar best = lane[0];
  for (int i = 1; i < kLanes; ++i) best = lane[i] > best ? lane[i] : best;
  return best;
}
inline float horizontal_max(vf x) { return best_lane<float>(x); }
inline int32_t horizontal_max(vi x) { return best_lane<int32_t>(x); }
inline void horizontal_sums(const vf (&x)[4], float* out) {
  for (int i = 0; i < 4; ++i) out[i] = horizontal_sum(x[i]);
}
inline void horizontal_maxima(const vi (&x)[4], int32_t* out) {
  for (int i = 0; i < 4; ++i) out[i] = horizontal_max(x[i]);
}
#endif

// Two vectors of neighbouring elements.
template <class T>
inline void store(T* p, vf x, vf y) {
  store(p, x);
  store(p + kLanes, y);
}

// Copies whole cache lines past the caches, where `to` is aligned to them; finish_streaming() makes them visible to
// other threads.
inline void stream_lines(void* to, const void* from, int64_t bytes) {
#if defined(__AVX512F__)
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + i),
                        _mm512_loadu_si512(static_cast<const char*>(from) + i));
#elif defined(__AVX2__)
  for (int64_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i)));
#else
  std::memcpy(to, from, size_t(bytes));
#endif
}
inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace fastok::FASTOK_ISA
