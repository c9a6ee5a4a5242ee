// max_coverage on the CPU: what the binding (max_coverage_cpu.cpp) and the SIMD cores (max_coverage_simd.cpp) share,
// and the planner. Torch-free.
#pragma once
#include <algorithm>
#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/exact.h"
#include "max_coverage/max_coverage_plan.h"

namespace fastok {

// A matrix [rows, n] of similarities.
struct SimilarityRows {
  const void* data;
  Dtype dtype;
  int64_t row_stride, stride;  // in elements
  int64_t rows, n;
};

// Similarities of a pair are kept up to this; beyond, columns are computed when a gain is looked at, and the latest
// kept.
constexpr int64_t kMostSimilarityBytes = 256 << 20;

// How many columns of `rows` similarities are kept, out of n.
inline int64_t plan_kept_columns(int64_t rows, int64_t n) {
  const int64_t fitting = kMostSimilarityBytes / (std::max<int64_t>(rows, 1) * int64_t(sizeof(float)));
  return std::clamp<int64_t>(fitting, std::min<int64_t>(n, 64), n);
}

struct CoverageKernels {
  void (*measure)(const TokenRows&, int64_t begin, int64_t end, TokenScale*);
  // Columns [begin, end) of a matrix, [column][rows] in fp32.
  void (*gather)(const SimilarityRows&, int64_t begin, int64_t end, float* out);
  // The same of the cosines of tokens `y` (rows) and `x` (columns); NaN where one is not finite. `scratch` holds
  // kCenters centers of x's width, padded to a multiple of 32.
  void (*cosines)(const TokenRows& y, const TokenScale* y_scales, const TokenRows& x, const TokenScale* x_scales,
                  int64_t begin, int64_t end, double* scratch, float* out);
  float (*peak)(const float* column, int64_t rows);  // the largest finite number, at least 0
  // What a column adds to what is covered, counted in 1 / unit: exact. NaN if the column has a NaN.
  double (*gain)(const float* column, const double* covered, double unit, int64_t rows);
  void (*cover)(const float* column, double* covered, double unit, int64_t rows);
};

constexpr int kCenters = 4;

FASTOK_DECLARE_KERNELS(CoverageKernels, max_coverage_kernels)

}  // namespace fastok
