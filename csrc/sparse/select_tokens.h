// Choosing the best of many scores on the CPU: what the binding (select_tokens_cpu.cpp) and the SIMD core
// (select_tokens_simd.cpp) share. Torch-free.
#pragma once
#include <cstdint>

#include "cpu/dispatch.h"

namespace fastok {

// Scratch memory of one `largest` call for n scores, in 32-bit words.
inline constexpr int64_t largest_scratch(int64_t n) { return 3 * n + 16; }

struct SelectTokensKernels {
  // Indices of the m (0 < m <= n) largest of x[0, n), ascending; ties go to the lowest index, NaN counts as -inf.
  void (*largest)(const float* x, int64_t n, int64_t m, int32_t* index, uint32_t* scratch);
};

FASTOK_DECLARE_KERNELS(SelectTokensKernels, select_tokens_kernels)

}  // namespace fastok
