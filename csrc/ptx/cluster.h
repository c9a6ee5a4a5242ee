// Clusters of blocks (sm_90 and newer): their barrier, and the shared memory of one's neighbours. That may be entered
// once all blocks have met at the barrier, and until they meet there for the last time: a block that has not begun or
// has exited has none.
#pragma once
#include "ptx/mbarrier.h"

namespace fastok::ptx {

// Which block of its cluster this is.
__device__ __forceinline__ int cluster_ctarank() {
#if defined(FASTOK_HOST)
  return simt::cluster_rank();
#else
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#endif
}

// All threads of the cluster arrive, then wait: what each has done before it arrived comes before what any does after
// it has waited.
__device__ __forceinline__ void barrier_cluster_arrive() {
#if defined(FASTOK_HOST)
  simt::arrive_at_cluster();
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void barrier_cluster_wait() {
#if defined(FASTOK_HOST)
  simt::wait_for_cluster();
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The address, among the cluster's, of what lies in block `rank` where `shared` does in this one.
__device__ __forceinline__ uint32_t mapa(const void* shared, int rank) {
#if defined(FASTOK_HOST)
  return simt::map_shared(shared, rank);
#else
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
#endif
}

__device__ __forceinline__ uint32_t ld_shared_cluster(uint32_t address) {
#if defined(FASTOK_HOST)
  return simt::load_cluster(address);
#else
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
#endif
}
__device__ __forceinline__ void st_shared_cluster(uint32_t address, uint32_t value) {
#if defined(FASTOK_HOST)
  simt::store_cluster(address, value);
#else
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
#endif
}

}  // namespace fastok::ptx
