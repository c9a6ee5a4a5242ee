// Tokens whose distances are the same bits on every backend (python/fastok/reference/k_center.py): what SIMD cores and
// their callers share. Torch-free.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace fastok {

// The tokens [count, width] of one sample.
struct TokenRows {
  const void* data;
  Dtype dtype;
  int64_t stride;  // elements from one token to the next; the last dimension is contiguous
  int64_t count, width;

  const void* row(int64_t i) const {
    return static_cast<const char*>(data) + i * stride * int64_t(element_size(dtype));
  }
};

// What is measured of a token once. Its integers are round(x * scale).
struct TokenScale {
  float scale;  // a power of two, exact in fp32
  bool finite;
  double norm;    // of the integers, clamped as the token's at 1e-12
  double length;  // of the token, by its integers
};

}  // namespace fastok
