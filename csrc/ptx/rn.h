// fp64 operations rounded by themselves: the compiler fuses plain ones.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

__device__ __forceinline__ double add_rn(double x, double y) {
#if defined(FASTOK_HOST)
  return x + y;
#else
  return __dadd_rn(x, y);
#endif
}

__device__ __forceinline__ double mul_rn(double x, double y) {
#if defined(FASTOK_HOST)
  return x * y;
#else
  return __dmul_rn(x, y);
#endif
}

}  // namespace fastok::ptx
