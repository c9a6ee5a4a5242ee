// cvt: conversions that CUDA C++ has no portable spelling for.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

// fp32 rounded to the nearest tf32 (10 bits of mantissa, halves away from zero), as bits.
__device__ __forceinline__ uint32_t cvt_rna_tf32(float x) {
#if defined(FASTOK_HOST)
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;  // infinity and NaN
  return (bits + 0x1000u) & 0xffffe000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

// Two fp32 rounded to 16 bits each, halves to even; `low` lands in the lower half of the word.
__device__ __forceinline__ uint32_t cvt_rn_f16x2(float low, float high) {
#if defined(FASTOK_HOST)
  return uint32_t(__half_as_ushort(__float2half_rn(low))) | uint32_t(__half_as_ushort(__float2half_rn(high))) << 16;
#else
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}
__device__ __forceinline__ uint32_t cvt_rn_bf16x2(float low, float high) {
#if defined(FASTOK_HOST)
  return uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(low))) |
         uint32_t(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
#else
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#endif
}

}  // namespace fastok::ptx
