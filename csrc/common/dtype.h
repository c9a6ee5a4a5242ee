// Element types of activations, shared by host and device code. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastok {

enum class Dtype { f32, f16, bf16, f64 };

inline constexpr size_t element_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// Storage of 16-bit floats: bits only, arithmetic is done in fp32.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

}  // namespace fastok
