// Selection on the CPU: what the bindings (select_cpu.cpp, peaks_cpu.cpp) and the SIMD cores (select_simd.cpp) share.
// Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace fastok {

// Keys that ascend from the best score; then NaN, then tokens that may not be chosen.
inline constexpr uint32_t kKeyUnscored = 0xfffffffdu, kKeyMasked = 0xfffffffeu;

// A lower bound of the squared distance between tokens `row` and `column` of a block.
struct Candidate {
  int32_t row, column;
  float low;
};

struct SelectKernels {
  // Keys of n scores that are `stride` elements apart.
  void (*keys)(Dtype, const void* scores, int64_t stride, int64_t n, uint32_t* out);
  // out[i] = x[i] - centre[i], in fp32; returns the sum of the squares.
  float (*centred)(Dtype, const void* x, const float* centre, int64_t width, float* out);
  void (*add_row)(Dtype, const void* x, int64_t width, float* sum);
  // Squared distance of two rows: 16 interleaved sums, neither reordered nor contracted, then added in pairs. The same
  // bits for every instruction set, and on CUDA.
  float (*squared_distance)(Dtype, const void* x, const void* y, int64_t width);
  // From the dot products of a block, those pairs whose low = low_row + low_column - 2 dot is less than bar_row of
  // their row or bar_column of their column (nullptr: rows only). Returns how many; `out` has room for all pairs.
  int64_t (*screen)(const float* dots, int64_t pitch, int64_t n_rows, int64_t n_columns, const float* low_row,
                    const float* low_column, const float* bar_row, const float* bar_column, Candidate* out);
};

FASTOK_DECLARE_KERNELS(SelectKernels, select_kernels)

// The k lowest of n keys in ascending order, equal ones by index.
void top_by_score(const uint32_t* keys, int64_t n, int64_t k, int64_t* out);

}  // namespace fastok
