// How max_coverage counts, and how it runs on CUDA. Pure functions. Torch-free.
#pragma once
#include <algorithm>

#include "common/plan.h"

namespace fastok {

// Similarities are counted in units of 2^-exponent, so fine that sums over `rows` of them stay below 2^53.
// `peak_exponent` is that of the largest finite one, as frexp gives it.
FASTOK_HOST_DEVICE inline int coverage_exponent(int64_t rows, int peak_exponent) {
  int bits = 0;
  while (rows > 1 && (rows - 1) >> bits) ++bits;
  const int exponent = 52 - bits - peak_exponent;
  return exponent < 200 ? exponent : 200;
}

namespace cuda {

constexpr int kCoverageThreads = 256;  // of blocks whose warps or threads take a token or a row each, at most
constexpr int kMostGainThreads = 1024;
constexpr int kGainColumns = 32;     // that a block adds up gains of, a thread each of a warp
constexpr int kMostRowBlocks = 128;  // per sample: what each block of the next launch adds up

// The largest number of a pair's similarities kept, of the whole batch: 512 MiB.
constexpr int64_t kMostSimilarities = int64_t(1) << 27;

struct CoveragePlan {
  bool kept;                      // all of a pair's similarities are computed once; else those that a pick asks for
  int cover_threads, row_blocks;  // of the launch that covers; per sample
  int gain_threads;               // of the launch that adds up gains from a matrix
};

inline CoveragePlan plan_max_coverage(int64_t batch, int64_t rows, int64_t n, bool pair,
                                      int64_t most_similarities = kMostSimilarities) {
  const auto warps_for = [](int64_t items, int64_t each, int64_t most) {
    return int(std::clamp<int64_t>((items + each - 1) / each, 1, most));
  };
  const bool kept = pair && batch * rows * n <= most_similarities;
  const int cover_warps = warps_for(std::max(rows, n), 32, kCoverageThreads / 32);
  const int rows_at_once = cover_warps * (pair && !kept ? 1 : 32);
  return {kept, 32 * cover_warps, warps_for(rows, rows_at_once, kMostRowBlocks),
          32 * warps_for(rows, 8, kMostGainThreads / 32)};
}

}  // namespace cuda
}  // namespace fastok
