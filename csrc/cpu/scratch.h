// Cache-line aligned memory for CPU kernels, freed with its owner.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>

#include "common/tensor.h"

namespace fastok {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<std::byte, Free>;

inline Scratch allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  STD_TORCH_CHECK(p != nullptr, "out of memory: ", bytes, " bytes of scratch");
  return Scratch(static_cast<std::byte*>(p));
}

}  // namespace fastok
