// exp and tanh on vectors, to about one unit in the last place. The coefficients are least-squares fits over Chebyshev
// points. See cpu/simd.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"

namespace fastok::FASTOK_ISA {

// x * 2**n, where `shifted` is n added to 1.5 * 2**23, so that n is in its lowest bits.
#if defined(__AVX512F__)
// The instruction that does it keeps NaN and goes to infinity by itself.
inline vf times_power(vf x, vf shifted) { return _mm512_scalef_ps(x, shifted - splat(0x1.8p23f)); }
#elif defined(__AVX2__)
inline vf times_power(vf x, vf shifted) {
  return _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23)));
}
#else
inline vf times_power(vf x, vf shifted) { return (vf)((vi)x + ((vi)shifted << 23)); }
#endif

// 0 below the smallest normal number, infinity above the largest, NaN for NaN.
inline __attribute__((always_inline)) vf exp_of(vf x) {
  constexpr float kShift = 0x1.8p23f, kSmallest = -87.33654f;
  const vf shifted = fma(x, splat(1.44269504f), splat(kShift));
  const vf n = shifted - splat(kShift);
  // ln 2 in two parts, the first short enough for n times it to be exact.
  const vf rest = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  vf p = splat(1.3933733571e-3f);
  p = fma(p, rest, splat(8.3632357419e-3f));
  p = fma(p, rest, splat(4.1666463017e-2f));
  p = fma(p, rest, splat(1.6666576266e-1f));
  p = fma(p, rest, splat(0.5f));
  p = fma(p, rest * rest, rest) + splat(1.0f);
  vf result = times_power(p, shifted);
#if !defined(__AVX512F__)
  constexpr float kLargest = 88.72283f;
  result = select(greater(x, splat(kLargest)), splat(std::numeric_limits<float>::infinity()), result);
  result = select(unordered(x), x, result);
#endif
  return select(greater(splat(kSmallest), x), splat(0.0f), result);
}

inline __attribute__((always_inline)) vf tanh_of(vf x) {
  const vf square = x * x;
  vf p = splat(-6.2763737515e-3f);
  p = fma(p, square, splat(2.1116202697e-2f));
  p = fma(p, square, splat(-5.3875133395e-2f));
  p = fma(p, square, splat(1.3332924247e-1f));
  p = fma(p, square, splat(-3.3333331347e-1f));
  const vf near = fma(p, x * square, x);
  const vf far = splat(1.0f) - splat(2.0f) / (exp_of(x + x) + splat(1.0f));
  return select(greater(absolute(x), splat(0.6f)), far, near);
}

}  // namespace fastok::FASTOK_ISA
