// bar: barriers 1 to 15 of a block, which some of its warps meet at.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

__device__ __forceinline__ void bar_sync(int id, int threads) {
#if defined(FASTOK_HOST)
  simt::bar_sync(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
#if defined(FASTOK_HOST)
  simt::bar_arrive(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace fastok::ptx
