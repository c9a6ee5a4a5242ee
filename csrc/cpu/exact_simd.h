// Sums that are exact in fp64, or made in a fixed order: see reference/k_center.py for the definitions.
#pragma once
#include "cpu/exact.h"
#include "cpu/simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// ---- fp64 vectors, half as many lanes as fp32's ---------------------------------------------------------------------

constexpr int kWide = kLanes / 2;

#if defined(__AVX512F__)
using vd = __m512d;
inline vd load_wide(const double* p) { return _mm512_loadu_pd(p); }
inline void store_wide(double* p, vd x) { _mm512_storeu_pd(p, x); }
inline vd splat_wide(double x) { return _mm512_set1_pd(x); }
inline vd fma_wide(vd a, vd b, vd c) { return _mm512_fmadd_pd(a, b, c); }
inline vd lower_half(vf x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline vd upper_half(vf x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
inline vf to_integers(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#elif defined(__AVX2__)
using vd = __m256d;
inline vd load_wide(const double* p) { return _mm256_loadu_pd(p); }
inline void store_wide(double* p, vd x) { _mm256_storeu_pd(p, x); }
inline vd splat_wide(double x) { return _mm256_set1_pd(x); }
inline vd fma_wide(vd a, vd b, vd c) { return _mm256_fmadd_pd(a, b, c); }
inline vd lower_half(vf x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline vd upper_half(vf x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
inline vf to_integers(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
#else
typedef double vd __attribute__((vector_size(16)));
inline vd load_wide(const double* p) {
  vd x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store_wide(double* p, vd x) { std::memcpy(p, &x, sizeof x); }
inline vd splat_wide(double x) { return vd{x, x}; }
inline vd fma_wide(vd a, vd b, vd c) { return a * b + c; }  // only where products are exact
inline vd lower_half(vf x) { return vd{double(x[0]), double(x[1])}; }
inline vd upper_half(vf x) { return vd{double(x[2]), double(x[3])}; }
// Numbers below 2^51 come out of this sum rounded to integers, halves to even.
inline double to_integer(double x) { return (x + 0x1.8p52) - 0x1.8p52; }
inline vf to_integers(vf x) {
  for (int i = 0; i < kLanes; ++i) x[i] = float(to_integer(double(x[i])));
  return x;
}
#endif

// ---- tokens, 32 elements at a time ----------------------------------------------------------------------------------

constexpr int kStep = 32, kStepVectors = kStep / kLanes;

// Calls body(d, vectors) for every 32 elements of a row; past its end they are 0.
template <class T, class Body>
inline __attribute__((always_inline)) void for_steps(const T* x, int64_t width, const Body& body) {
  vf part[kStepVectors];
  int64_t d = 0;
  for (; d + kStep <= width; d += kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < kStepVectors; ++i) part[i] = load(x + d + i * kLanes);
    body(d, part);
  }
  if (d == width) return;
  float rest[kStep] = {};
  for (int64_t e = d; e < width; ++e) rest[e - d] = widen(x[e]);
  for (int i = 0; i < kStepVectors; ++i) part[i] = load(rest + i * kLanes);
  body(d, part);
}

// Calls body(typed pointer) for a row.
template <class Body>
inline __attribute__((always_inline)) void with_row(const TokenRows& rows, int64_t i, const Body& body) {
  switch (rows.dtype) {
    case Dtype::f16:
      return body(static_cast<const f16*>(rows.row(i)));
    case Dtype::bf16:
      return body(static_cast<const bf16*>(rows.row(i)));
    default:
      return body(static_cast<const float*>(rows.row(i)));
  }
}

// 32 sums, lane l those of the elements l, l + 32, ...
struct Lanes {
  static constexpr int kVectors = kStep / kWide;
  vd sum[kVectors];

  inline __attribute__((always_inline)) void reset() {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) sum[i] = splat_wide(0.0);
  }
  // Lane l and lane l + 16 first, then l and l + 8, ...
  double total() const {
    double lane[kStep];
    for (int i = 0; i < kVectors; ++i) store_wide(lane + i * kWide, sum[i]);
    for (int half = kStep / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
  }
};

inline int exponent_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x == 0 ? 0 : int(bits >> 52 & 0x7ff) - 1022;  // as frexp
}
inline double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline double ceiling(double x) {
  const double nearest = (x + 0x1.8p52) - 0x1.8p52;
  return nearest < x ? nearest + 1 : nearest;
}

template <class T>
TokenScale measure_row(const T* x, int64_t width) {
  vf peak = splat(0.0f), odd = splat(0.0f);
  for_steps(x, width, [&](int64_t, const vf* part) {
#pragma GCC unroll 8
    for (int i = 0; i < kStepVectors; ++i) {
      odd = fma(part[i], splat(0.0f), odd);  // NaN from then on if one is not finite
      peak = maximum(absolute(part[i]), peak);
    }
  });
  if (any(unordered(odd))) return {0, false, 1, 0};
  const double top = horizontal_max(peak);
  if (top == 0) return {1, true, 1, 0};

  const int peak_exponent = exponent_of(top);
  const double unit = power_of_two(12 - peak_exponent);
  Lanes lanes;
  lanes.reset();
  for_steps(x, width, [&](int64_t, const vf* part) {
#pragma GCC unroll 16
    for (int i = 0; i < Lanes::kVectors; ++i) {
      vd v = (i % 2 == 0 ? lower_half(part[i / 2]) : upper_half(part[i / 2])) * splat_wide(unit);
      v = v * v;
#if defined(__AVX512F__)
      v = _mm512_roundscale_pd(v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
      v = _mm256_ceil_pd(v);
#else
      v = vd{ceiling(v[0]), ceiling(v[1])};
#endif
      lanes.sum[i] = lanes.sum[i] + v;
    }
  });
  const int half = (exponent_of(lanes.total()) + 1) / 2;
  const int exponent = 36 - half - peak_exponent < 63 ? 36 - half - peak_exponent : 63;
  const float scale = float(power_of_two(exponent));
  lanes.reset();
  for_steps(x, width, [&](int64_t, const vf* part) {
#pragma GCC unroll 16
    for (int i = 0; i < Lanes::kVectors; ++i) {
      const vf q = to_integers(part[i / 2] * splat(scale));
      const vd v = i % 2 == 0 ? lower_half(q) : upper_half(q);
      lanes.sum[i] = fma_wide(v, v, lanes.sum[i]);
    }
  });
  const double norm = __builtin_sqrt(lanes.total()), least = 1e-12 * power_of_two(exponent);
  return {scale, true, norm > least ? norm : least, norm * power_of_two(-exponent)};
}

inline TokenScale measure(const TokenRows& rows, int64_t i) {
  TokenScale result;
  with_row(rows, i, [&](const auto* x) { result = measure_row(x, rows.width); });
  return result;
}

// A row as fp64, padded with zeros to a multiple of 32: its integers if `scale` is not 0, else as it is.
inline void widen_row(const TokenRows& rows, int64_t i, float scale, double* out) {
  with_row(rows, i, [&](const auto* x) {
    for_steps(x, rows.width, [&](int64_t d, const vf* part) {
      for (int v = 0; v < kStepVectors; ++v) {
        const vf q = scale == 0 ? part[v] : to_integers(part[v] * splat(scale));
        store_wide(out + d + v * kLanes, lower_half(q));
        store_wide(out + d + v * kLanes + kWide, upper_half(q));
      }
    });
  });
}

// The product of a token's integers with those of a widened one.
template <class T>
inline double dot(const T* x, float scale, const double* center, int64_t width) {
  Lanes lanes;
  lanes.reset();
  for_steps(x, width, [&](int64_t d, const vf* part) {
    vf q[kStepVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kStepVectors; ++i) q[i] = to_integers(part[i] * splat(scale));
#pragma GCC unroll 16
    for (int i = 0; i < Lanes::kVectors; ++i) {
      const vd v = i % 2 == 0 ? lower_half(q[i / 2]) : upper_half(q[i / 2]);
      lanes.sum[i] = fma_wide(v, load_wide(center + d + i * kWide), lanes.sum[i]);
    }
  });
  return lanes.total();
}

template <class T>
inline double squared_distance(const T* x, const double* center, int64_t width) {
  Lanes lanes;
  lanes.reset();
  for_steps(x, width, [&](int64_t d, const vf* part) {
#pragma GCC unroll 16
    for (int i = 0; i < Lanes::kVectors; ++i) {
      const vd v = i % 2 == 0 ? lower_half(part[i / 2]) : upper_half(part[i / 2]);
      const vd difference = load_wide(center + d + i * kWide) - v;
      lanes.sum[i] = lanes.sum[i] + difference * difference;  // two roundings: never fused
    }
  });
  return lanes.total();
}

inline float cosine(double product, double norm_a, double norm_b) { return float(product / (norm_a * norm_b)); }

}  // namespace
}  // namespace fastok::FASTOK_ISA
