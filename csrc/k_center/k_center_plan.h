// How k_center runs on CUDA. Pure functions. Torch-free.
#pragma once
#include <algorithm>

#include "common/plan.h"

namespace fastok::cuda {

constexpr int kCenterThreads = 256;    // of blocks whose warps take a token each
constexpr int kPickThreads = 512;      // of the block that picks for a sample
constexpr int kMostTokenBlocks = 512;  // per sample: what each block of the next step looks through

struct CenterPlan {
  bool gram;            // all distances first, then every pick of a sample in one block; else a launch per pick
  int token_blocks;     // per sample, of a launch per pick
  size_t gram_numbers;  // 0 without
  size_t pick_bytes;    // of shared memory
};

// All distances pay for the cosine where they fit, and the values of a sample into a block's shared memory.
inline CenterPlan plan_k_center(int64_t batch, int64_t n, int64_t k, bool cosine) {
  constexpr int64_t kMostGramNumbers = int64_t(1) << 27, kMostTokens = 8192, kFewPicks = 8;
  CenterPlan plan{};
  plan.gram = cosine && n <= kMostTokens && batch * n * n <= kMostGramNumbers && k >= kFewPicks;
  plan.gram_numbers = plan.gram ? size_t(batch * n * n) : 0;
  plan.token_blocks =
      int(std::clamp<int64_t>((n + kCenterThreads / 32 - 1) / (kCenterThreads / 32), 1, kMostTokenBlocks));
  plan.pick_bytes = shared_bytes<double>(32) + shared_bytes<int>(32) + shared_bytes<double>(size_t(plan.gram ? n : 0));
  return plan;
}

}  // namespace fastok::cuda
