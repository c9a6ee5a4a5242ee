// cp.async.bulk.tensor: tiles of an array, from global to shared memory by one thread's instruction.
#pragma once
#include "common/tensor_map.h"
#include "ptx/mbarrier.h"
#if !defined(FASTOK_HOST)
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#endif

namespace fastok::ptx {

// Starts copying the tile that begins at these coordinates to a multiple of 1024 bytes. It counts on the barrier with
// all its bytes, also those outside of the array, which become zeros.
__device__ __forceinline__ void cp_async_bulk_tensor_4d(void* tile, const cuda::TensorMap& map, Mbarrier& barrier,
                                                        int x0, int x1, int x2, int x3) {
#if defined(FASTOK_HOST)
  const int at[4] = {x0, x1, x2, x3};
  simt::copy_tile(tile, map.bytes, &barrier, at);
#else
  constexpr auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_4D::copy(&map, &barrier.state, hint, tile, x0, x1, x2, x3);
#endif
}

// Orders the thread's own loads and stores of shared memory before later accesses by bulk copies and wgmma.
__device__ __forceinline__ void fence_proxy_async() {
#if !defined(FASTOK_HOST)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

}  // namespace fastok::ptx
