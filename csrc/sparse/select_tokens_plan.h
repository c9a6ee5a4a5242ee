// Shapes of the token selection kernels. Pure functions of the problem, for host and device. Torch-free.
#pragma once
#include "select/select_plan.h"

namespace fastok::cuda {

// Tokens that a block takes at a time: 16 bytes of scores per thread.
constexpr int kSelectThreads = 1024, kSelectTile = 4 * kSelectThreads;
// Candidates whose keys the last block keeps in shared memory.
constexpr int kCachedKeys = 8192;

// Heads of one tile, and selection by mass, are one block's work; of the others each block has a tile.
inline constexpr bool selects_by_row(int64_t tokens, bool by_mass) { return by_mass || tokens <= kSelectTile; }
inline constexpr int64_t select_tiles(int64_t tokens) { return (tokens + kSelectTile - 1) / kSelectTile; }

inline constexpr size_t select_bytes(bool by_mass) {
  return cut_bytes() + (by_mass ? shared_bytes<uint64_t>(kDigits) + shared_bytes<uint64_t>(32 + 4) : 0);
}
inline constexpr size_t collect_bytes() { return cut_bytes() + shared_bytes<uint32_t>(kCachedKeys); }

// Working memory of tiles, in 32-bit words: what is to be zero (digits and two tickets per head), the state of each
// head, and three numbers per tile. Besides, there are 64 bits per token for candidates.
constexpr int kHeadState = 4;
inline constexpr int64_t select_zeros(int64_t heads) { return heads * (kDigits + 2); }
inline constexpr int64_t select_words(int64_t heads, int64_t tokens) {
  return select_zeros(heads) + heads * (kHeadState + 3 * select_tiles(tokens));
}

}  // namespace fastok::cuda
