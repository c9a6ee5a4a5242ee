// What launch plans share. Pure functions, for host and device. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

// A planner that kernels call too.
#if defined(__CUDACC__)
#define FASTOK_HOST_DEVICE __host__ __device__
#else
#define FASTOK_HOST_DEVICE
#endif

namespace fastok::cuda {

// What every supported device grants a block (compute capability 8.6 has the least: 99 KiB).
constexpr size_t kMostSharedBytes = 99 << 10;

// What an array takes of a block's shared memory (SharedMemory::take).
template <class T>
FASTOK_HOST_DEVICE constexpr size_t shared_bytes(size_t count) {
  return (count * sizeof(T) + 15) / 16 * 16;
}

}  // namespace fastok::cuda
