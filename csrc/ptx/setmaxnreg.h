// setmaxnreg: registers that one warpgroup hands back and another takes over.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
#if !defined(FASTOK_HOST)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
#if !defined(FASTOK_HOST)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace fastok::ptx
