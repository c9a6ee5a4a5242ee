#include "floats.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace {

// A binary format with a sign bit, `exponent` bits and `mantissa` bits. e4m3 spends its highest exponent on numbers,
// all but the last of them; the others on infinity and NaN.
struct Format {
  int exponent, mantissa;
  bool finite = false;

  int bias() const { return (1 << (exponent - 1)) - 1; }
  uint32_t nan() const { return finite ? 0x7f : infinity() | ((1u << mantissa) - 1); }
  uint32_t infinity() const { return ((1u << exponent) - 1) << mantissa; }
  uint32_t largest() const { return (finite ? nan() : infinity()) - 1; }

  float widen(uint32_t bits) const {
    const uint32_t sign = bits >> (exponent + mantissa), size = bits & ((1u << (exponent + mantissa)) - 1);
    const int power = int(size >> mantissa), fraction = int(size & ((1u << mantissa) - 1));
    float x =
        std::ldexp(float(power > 0 ? fraction + (1 << mantissa) : fraction), std::max(power, 1) - bias() - mantissa);
    if (finite ? size == nan() : size > infinity()) x = std::numeric_limits<float>::quiet_NaN();
    if (!finite && size == infinity()) x = std::numeric_limits<float>::infinity();
    return sign ? -x : x;
  }

  // To the nearest, halves to even. Past the largest number lies `overflow`.
  uint32_t narrow(float x, uint32_t overflow) const {
    const uint32_t sign = uint32_t(std::signbit(x)) << (exponent + mantissa);
    const float size = std::fabs(x);
    if (std::isinf(x)) return sign | overflow;
    // The unit in the last place near x; a carry out of the mantissa goes into the exponent.
    const int power = std::max(size > 0 ? std::ilogb(size) : 1 - bias(), 1 - bias());
    const auto units = uint64_t(std::nearbyint(std::ldexp(size, mantissa - power)));
    const uint64_t bits = units + (uint64_t(power + bias() - 1) << mantissa);
    return sign | (bits > largest() ? overflow : uint32_t(bits));
  }
};

constexpr Format kHalf{5, 10}, kE4m3{4, 3, true}, kE5m2{5, 2};

}  // namespace

float __half2float(__half x) { return kHalf.widen(x.bits); }
__half __float2half_rn(float x) { return {uint16_t(std::isnan(x) ? 0x7fff : kHalf.narrow(x, kHalf.infinity()))}; }

float __bfloat162float(__nv_bfloat16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }
__nv_bfloat16 __float2bfloat16_rn(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

__nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturation, __nv_fp8_interpretation_t which) {
  const Format& format = which == __NV_E4M3 ? kE4m3 : kE5m2;
  if (std::isnan(x)) return __nv_fp8_storage_t(format.nan());
  const uint32_t overflow = saturation == __NV_SATFINITE ? format.largest()
                            : format.finite              ? format.nan()
                                                         : format.infinity();
  return __nv_fp8_storage_t(format.narrow(x, overflow));
}
__half __nv_cvt_fp8_to_halfraw(__nv_fp8_storage_t x, __nv_fp8_interpretation_t which) {
  return __float2half_rn((which == __NV_E4M3 ? kE4m3 : kE5m2).widen(x));
}
