// cp.async: copies from global to shared memory that run beside the computation.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

// Starts copying 16 bytes (both addresses 16-byte aligned); if not `valid`, zeros are written and nothing is read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#if defined(FASTOK_HOST)
  simt::begin_copy(shared, global, 16, valid);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#endif
}

// Waits until the calling thread's copies have landed and are visible to it; a barrier makes them visible to others.
__device__ __forceinline__ void cp_async_wait_all() {
#if defined(FASTOK_HOST)
  simt::wait_for_copies(0);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Ends a group of the calling thread's copies: those begun since the last one ended.
__device__ __forceinline__ void cp_async_commit() {
#if defined(FASTOK_HOST)
  simt::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last kLeft groups have landed.
template <int kLeft>
__device__ __forceinline__ void cp_async_wait_groups() {
#if defined(FASTOK_HOST)
  simt::wait_for_copies(kLeft);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

}  // namespace fastok::ptx
