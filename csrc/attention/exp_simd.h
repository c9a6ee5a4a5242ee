// 2**x and tanh on vectors, to about one unit in the last place. The coefficients are minimax or least-squares fits
// over Chebyshev points. See cpu/simd.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"

namespace fastok::FASTOK_ISA {

#if defined(__AVX2__) && !defined(__AVX512F__)
// x * 2**n, where `shifted` is n + 1.5 * 2**23: n is in its lowest bits.
inline vf add_exponent(vf x, vf shifted) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}
#elif !defined(__AVX512F__)
inline vf add_exponent(vf x, vf shifted) {
  typedef uint32_t words __attribute__((vector_size(16)));  // which may overflow
  return (vf)((words)x + ((words)shifted << 23));
}
#endif

constexpr float kLog2E = 1.44269504f;

// 2**x: 0 below the smallest normal number, infinity above the largest, NaN for NaN; exactly 1 for 0.
#if defined(__AVX512F__)
// 2**(x - n) of the next lower integer n, which scalef takes by itself. Of infinity there remains 0.
inline __attribute__((always_inline)) vf exp2_of_rest(vf x) {
  const vf rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf p = splat(1.867130087e-3f);
  p = fma(p, rest, splat(9.017030275e-3f));
  p = fma(p, rest, splat(5.579991315e-2f));
  p = fma(p, rest, splat(2.401644501e-1f));
  p = fma(p, rest, splat(6.931513118e-1f));
  return fma(p, rest, splat(1.0f));
}
inline __attribute__((always_inline)) vf exp2_of(vf x) {
  // Subnormal results would take hundreds of cycles. "Not less" is also true for NaN.
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ), exp2_of_rest(x), x);
}
#else
inline __attribute__((always_inline)) vf exp2_of(vf x) {
  constexpr float kSmallest = -126.0f, kShift = 0x1.8p23f;
  const vf shifted = x + splat(kShift), n = shifted - splat(kShift);
  const vf rest = x - n;
  vf p = splat(1.546147105e-4f);
  p = fma(p, rest, splat(1.339089009e-3f));
  p = fma(p, rest, splat(9.618056938e-3f));
  p = fma(p, rest, splat(5.550356954e-2f));
  p = fma(p, rest, splat(2.402265072e-1f));
  p = fma(p, rest, splat(6.931471825e-1f));
  p = fma(p, rest, splat(1.0f));
  vf result = add_exponent(p, shifted);
  result = select(greater(splat(128.0f), x), result, splat(std::numeric_limits<float>::infinity()));
  result = select(greater(splat(kSmallest), x), splat(0.0f), result);
  return select(unordered(x), x, result);
}
#endif

#if defined(__AVX512BF16__)
// The same to 6e-7, faster, as long as a Flushing lives; NaN for infinity. 2**(x - n) of the nearest multiple n of 1/16
// is a short polynomial's, 2**(n's fraction) a table's: while tiles are in use, sums and permutations find a free port,
// multiplications do not (docs/attention-on-tiles.md).
inline __attribute__((always_inline)) vf flushed_exp2_of(vf x) {
  alignas(64) static constexpr float kPowers[16] = {
      1.000000000f, 1.044273734f, 1.090507746f, 1.138788581f, 1.189207077f, 1.241857767f, 1.296839595f, 1.354255557f,
      1.414213538f, 1.476826191f, 1.542210817f, 1.610490322f, 1.681792855f, 1.756252170f, 1.834008098f, 1.915206552f};
  constexpr float kShift = 0x1.8p19f, kSmallest = -150.0f;
  const vf shifted = x + splat(kShift), n = shifted - splat(kShift);
  const __mmask16 some = _mm512_cmp_ps_mask(x, splat(kSmallest), _CMP_NLT_UQ);  // also NaN
  const vf rest = _mm512_maskz_sub_ps(some, x, n);                              // of -infinity there remains 0
  const vf power = _mm512_permutexvar_ps(_mm512_castps_si512(shifted), load(kPowers));
  return _mm512_scalef_ps(fma(power * rest, fma(splat(2.402265868e-1f), rest, splat(6.931879471e-1f)), power), n);
}

// Flushes subnormal results to 0, as long as it lives.
class Flushing {
 public:
  Flushing() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  Flushing(const Flushing&) = delete;
  Flushing& operator=(const Flushing&) = delete;
  ~Flushing() { _mm_setcsr(before_); }

 private:
  unsigned before_;
};
#endif

// The natural logarithm, to about one unit in the last place, of positive normal numbers and infinity; NaN for NaN.
inline __attribute__((always_inline)) vf log_of(vf x) {
#if defined(__AVX512F__)
  const vf m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero), n = _mm512_getexp_ps(x / m);
  const vf s = (m - splat(1.0f)) / (m + splat(1.0f)), square = s * s;
  vf p = splat(2.0f / 9);
  p = fma(p, square, splat(2.0f / 7));
  p = fma(p, square, splat(2.0f / 5));
  p = fma(p, square, splat(2.0f / 3));
  p = fma(p, square, splat(2.0f));
  return fma(n, splat(0.693147181f), p * s);
#else
  float lane[kLanes];
  store(lane, x);
  for (float& number : lane) number = __builtin_logf(number);
  return load(lane);
#endif
}

inline __attribute__((always_inline)) vf tanh_of(vf x) {
  const vf square = x * x;
  vf p = splat(-6.2763737515e-3f);
  p = fma(p, square, splat(2.1116202697e-2f));
  p = fma(p, square, splat(-5.3875133395e-2f));
  p = fma(p, square, splat(1.3332924247e-1f));
  p = fma(p, square, splat(-3.3333331347e-1f));
  const vf near = fma(p, x * square, x);
  const vf far = splat(1.0f) - splat(2.0f) / (exp2_of(x * splat(2 * kLog2E)) + splat(1.0f));
  return select(greater(absolute(x), splat(0.6f)), far, near);
}

}  // namespace fastok::FASTOK_ISA
