// ex2: powers of two by the special function unit.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

// 2^x with a relative error of 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float ex2_approx_ftz(float x) {
#if defined(FASTOK_HOST)
  const float power = exp2f(x);
  return power < 0x1p-126f ? 0.0f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}

}  // namespace fastok::ptx
