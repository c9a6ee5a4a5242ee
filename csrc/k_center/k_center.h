// k_center on the CPU: what the binding (k_center_cpu.cpp) and the SIMD cores (k_center_simd.cpp) share, and the
// planner. Torch-free.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/dispatch.h"
#include "cpu/exact.h"

namespace fastok {

// ---- the plan -------------------------------------------------------------------------------------------------------

// How picks learn their distances to all tokens. Each gives the same picks.
enum class CenterPlan {
  exact,    // one exact pass over the tokens per pick
  tiles,    // all distances exactly, by tile products (cpu/exact_tiles.h)
  gram,     // all products approximately, by one symmetric matrix product; then exactly what is too close to call
  batches,  // as gram, but row by row: candidates in batches, before knowing which of them will be picked
};

struct CenterProblem {
  int64_t n, width, k;
  bool cosine, max_sum, isolated;
  int64_t candidates_scored;  // 0: to be planned
  bool has_tiles = false;     // the machine has tile products for this width
};

struct CenterChoice {
  CenterPlan plan;      // of the picks; of the isolated start too unless that is exact
  int64_t batch;        // candidates scored at once
  bool screened_start;  // the isolated start is found among approximate products
};

// The largest matrix of products kept.
constexpr int64_t kMostGramBytes = 256 << 20;
constexpr int64_t kCenterBatch = 64;

// Exact products of all pairs by tiles take the time of some n / 20 exact passes. Approximate products pay where exact
// ones can be left out: with max_min, for the cosine. A batch's products are about ten times as fast as exact passes,
// and about half of its candidates get picked.
inline CenterChoice plan_k_center(const CenterProblem& p) {
  const bool screens = p.cosine && !p.max_sum;
  const bool fits = p.n * p.n * int64_t(sizeof(float)) <= kMostGramBytes;
  const bool start = p.isolated && p.cosine && p.n > 1;
  const int64_t batch = p.candidates_scored > 0 ? p.candidates_scored : kCenterBatch;
  if (p.has_tiles && p.cosine && p.candidates_scored == 0 && fits && p.max_sum && (start || 16 * p.k >= p.n))
    return {CenterPlan::tiles, p.n, false};
  if (!screens || p.candidates_scored == 1) return {CenterPlan::exact, std::min<int64_t>(kCenterBatch, p.n), start};
  if (p.candidates_scored == 0 && fits && (start || 2 * p.k >= p.n / 2)) return {CenterPlan::gram, p.n, start};
  if (p.candidates_scored == 0 && p.k <= 8) return {CenterPlan::exact, std::min(batch, p.n), start};
  return {CenterPlan::batches, std::min(batch, p.n), start};
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// Approximate products of tokens, by packed panels of rows and of columns.
struct ScreenEngine {
  int rows, cols;  // of a panel
  size_t (*row_panel_bytes)(int64_t width);
  size_t (*col_panel_bytes)(int64_t width);
  // Tokens first, ..., first + rows - 1, or those listed; past `count` zeros. Returns the largest error of a token: the
  // norm of what packing changed, relative to the token's.
  float (*pack_rows)(const TokenRows&, const TokenScale*, const int32_t* listed, int64_t count, int64_t first,
                     void* out);
  float (*pack_cols)(const TokenRows&, const TokenScale*, int64_t first, void* out);
  // Called by a thread before and after it multiplies.
  void (*begin)();
  void (*end)();
  // Sums of products of one row panel with one column panel, to out[rows][pitch].
  void (*multiply)(const void* row_panel, const void* col_panel, int64_t width, float* out, int64_t pitch);
};

struct CenterKernels {
  ScreenEngine fp32;
  const ScreenEngine* bf16;  // nullptr without instructions for it

  void (*measure)(const TokenRows&, int64_t begin, int64_t end, TokenScale*);
  // A token as fp64 for the functions below: its integers, or with scale 0 as it is.
  void (*widen)(const TokenRows&, int64_t i, float scale, double* out);
  // Exact distances of a widened token to tokens [begin, end).
  void (*cosine_distances)(const TokenRows&, const TokenScale*, const double* center, double center_norm, int64_t begin,
                           int64_t end, float* out);
  void (*euclidean_distances)(const TokenRows&, const double* center, int64_t begin, int64_t end, float* out);

  // Products to distances in place: 1 - products * row_factor * col_factor.
  void (*finish_distances)(float* products, int64_t n, float row_factor, const float* col_factor);
  // The same on a block, with the nearest so far of each row and of each column.
  void (*finish_block)(float* block, int64_t rows, int64_t cols, int64_t pitch, const float* row_factor,
                       const float* col_factor, float* row_nearest, float* col_nearest);

  // A pick's approximate distances to tokens [0, n), n a multiple of 64, lower what they are known to be at most:
  // upper[j] becomes at most distance[j] + error. Returns how many tokens the pick may be nearer to than upper[j] was,
  // and lists them in `hits`, which has room for n + 1.
  int64_t (*lower_bounds)(const float* distance, float error, int64_t n, float* upper, int32_t* hits);
  // The first of the largest numbers, n of them, a multiple of 64; -1 if all are -inf.
  int64_t (*first_largest)(const float* x, int64_t n);
};

FASTOK_DECLARE_KERNELS(CenterKernels, k_center_kernels)

}  // namespace fastok
