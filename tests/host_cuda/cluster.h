// Host bodies of csrc/ptx/cluster.h: the barrier of a cluster, and what its blocks do in each other's shared memory.
#pragma once
#include <cstdint>

namespace simt {

__attribute__((const)) int cluster_rank();

void arrive_at_cluster();
void wait_for_cluster();

// The address of what lies where `shared` does, but in block `rank` of the cluster.
uint32_t map_shared(const void* shared, int rank);
uint32_t load_cluster(uint32_t address);
void store_cluster(uint32_t address, uint32_t value);

}  // namespace simt
