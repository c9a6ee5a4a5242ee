// Tensor maps: what the hardware of sm_90 knows of an array that it copies tiles from. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace fastok::cuda {

// A CUtensorMap as it goes to a kernel: a parameter of its own or part of one, never copied on the device.
struct alignas(128) TensorMap {
  unsigned char bytes[128];
};

// An array of 16-bit elements in four dimensions, innermost first, and the tile that one copy moves. What of a tile
// lies outside of the array is filled with zeros. Rows of a tile are 128 bytes, swizzled (ptx/wgmma.h).
struct TiledArray {
  const void* data;  // aligned to 16 bytes, as are the strides
  Dtype dtype;
  uint64_t sizes[4];    // each at least 1
  uint64_t strides[3];  // in bytes, of all dimensions but the first
  uint32_t tile[4];
};

}  // namespace fastok::cuda
