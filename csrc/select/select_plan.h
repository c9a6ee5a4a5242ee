// Shapes of the selection kernels: threads, shared memory, and what needs memory besides. Pure functions of the
// problem, for host and device. Torch-free.
#pragma once
#include "common/plan.h"

namespace fastok::cuda {

// Radix selection takes the highest 11 bits of a key first, then 11, then 10.
constexpr int kDigits = 1 << 11;

inline constexpr int row_threads(int64_t n) { return n > 2048 ? 1024 : 256; }

// What a block sorts: a power of two.
inline constexpr int64_t power_of_two(int64_t n) {
  int64_t width = 2;
  while (width < n) width *= 2;
  return width;
}

// ---- top_tokens -----------------------------------------------------------------------------------------------------

// Budgets that one launch takes along.
constexpr int kBudgets = 256;
// Up to this many picks are put in order of score by the block that picks them; beyond, by counting.
constexpr int64_t kSortedPicks = 4096;
constexpr int kPlaceThreads = 256, kPlaceTile = 1024;

inline constexpr size_t cut_bytes() {
  return shared_bytes<int>(kDigits) + shared_bytes<int>(32) + shared_bytes<int>(4);
}
inline constexpr size_t top_bytes(int64_t total, bool by_score) {
  const bool sorts = by_score && total <= kSortedPicks;
  return cut_bytes() + (sorts ? shared_bytes<uint64_t>(power_of_two(total)) : 0);
}

// ---- sample_cdf -----------------------------------------------------------------------------------------------------

// Up to this many unprotected tokens are sorted and summed in shared memory; beyond, in global memory.
constexpr int64_t kSampledInBlock = 4096;
// The picks' bit set must fit into one block's shared memory.
constexpr int64_t kMostSampled = int64_t(1) << 18;

inline constexpr size_t sample_bytes(int64_t n_free) {
  const size_t width = power_of_two(n_free);
  const size_t rows = n_free <= kSampledInBlock ? shared_bytes<uint64_t>(width) + shared_bytes<double>(width) : 0;
  return rows + 2 * shared_bytes<int>((width + 31) / 32) + shared_bytes<int>(32);
}

}  // namespace fastok::cuda
