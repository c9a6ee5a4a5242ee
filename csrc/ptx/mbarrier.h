// mbarrier: barriers in shared memory whose phases end when so many arrivals, and so many bytes of bulk copies, are in.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

struct alignas(8) Mbarrier {
  uint64_t state;
};

#if !defined(FASTOK_HOST)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// One thread initialises; then all fence, and meet at a barrier of the block.
__device__ __forceinline__ void mbarrier_init(Mbarrier& barrier, int arrivals) {
#if defined(FASTOK_HOST)
  simt::mbarrier_init(&barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
#endif
}
__device__ __forceinline__ void fence_mbarrier_init() {
#if !defined(FASTOK_HOST)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier& barrier) {
#if defined(FASTOK_HOST)
  simt::mbarrier_arrive(&barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
#endif
}

// Arrives, and announces so many bytes of copies.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(Mbarrier& barrier, int bytes) {
#if defined(FASTOK_HOST)
  simt::mbarrier_arrive(&barrier, bytes);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
#endif
}

// Waits for the end of a phase: of the barrier's first, third, ... if `parity` is 0, of the others if it is 1.
__device__ __forceinline__ void mbarrier_wait(Mbarrier& barrier, int parity) {
#if defined(FASTOK_HOST)
  simt::mbarrier_wait(&barrier, parity);
#else
  asm volatile(
      "{\n\t"
      ".reg .pred done;\n\t"
      "again:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra again;\n\t"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace fastok::ptx
