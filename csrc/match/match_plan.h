// Shapes of the matching kernels: tile sizes, which of them run, and how much shared memory they get. Pure functions of
// the problem, for host and device. Torch-free.
#pragma once
#include "merge/merge_plan.h"

namespace fastok::cuda {

enum class Similarity { cosine, dot, euclidean };

// ---- similarity tiles -----------------------------------------------------------------------------------------------

constexpr int kTileColumns = 64;
constexpr int kTileRowBytes = 128, kTileChunks = kTileRowBytes / 16;
// Row tiles stay in shared memory for the whole sweep while they take no more than this.
constexpr size_t kResidentBytes = 64 << 10;

// How a block sweeps over the columns.
struct SweepShape {
  int width;      // D
  int chunks;     // tiles along D
  int row_slots;  // row tiles in shared memory: `chunks`, or 2 used in turn
  bool cosine;    // else dot products
  bool aligned;   // rows can be read 16 bytes at a time
};

inline constexpr SweepShape plan_sweep(int64_t width, size_t element_size, int warps, bool cosine, bool aligned) {
  const int depth = int(kTileRowBytes / element_size);
  const int chunks = width > depth ? int((width + depth - 1) / depth) : 1;
  const size_t resident = size_t(chunks) * warps * 16 * kTileRowBytes;
  return {int(width), chunks, resident <= kResidentBytes || chunks <= 2 ? chunks : 2, cosine, aligned};
}

inline constexpr size_t sweep_bytes(const SweepShape& shape, int warps) {
  const size_t rows = size_t(warps) * 16;
  return (size_t(shape.row_slots) * rows + 2 * kTileColumns) * kTileRowBytes + shared_bytes<float>(rows) +
         shared_bytes<float>(2 * kTileColumns);
}

// Warps of a block, 16 rows each: more of them share the column tiles, fewer give more blocks. Splitting fp32 takes
// more registers than eight warps could have.
inline constexpr int plan_warps(int64_t rows, size_t element_size) { return rows > 64 && element_size == 2 ? 8 : 4; }

// ---- bipartite_match ------------------------------------------------------------------------------------------------

// Up to this many tokens and sources the block that finishes a sample last also selects and numbers, all in one
// launch: its shared memory holds them. Beyond, the whole grid ranks the sources by counting.
constexpr int64_t kFusedTokens = 4096, kFusedSources = 2048;
// The bit set that numbers the slots must fit into one block's shared memory.
constexpr int64_t kMostTokens = 1 << 17;
constexpr int kRankThreads = 256, kRankTile = 1024, kSlotThreads = 1024;

struct MatchPlan {
  int warps;          // of match_kernel
  int64_t row_tiles;  // blocks of match_kernel per sample
  bool fused;         // match_kernel does it all; else rank_kernel and slot_kernel follow
  SweepShape shape;
  size_t match_bytes;   // dynamic shared memory
  int64_t rank_blocks;  // of rank_kernel per sample
  size_t slot_bytes;    // of slot_kernel
  int sort_width, order_words;
  CsrPlan csr;
};

// Words of the bit set that numbers the slots: one bit for each place in slot order.
inline constexpr int64_t order_words(int64_t n, int64_t n_dst) { return (2 * n + n_dst + 31) / 32; }

// Bit set, its running counts, and one int per warp.
inline constexpr size_t numbering_bytes(int64_t n, int64_t n_dst) {
  return 2 * shared_bytes<int>(order_words(n, n_dst)) + shared_bytes<int>(32);
}

// What the one block sorts: a power of two.
inline constexpr int64_t sort_width(int64_t n_src) {
  int64_t width = 2;
  while (width < n_src) width *= 2;
  return width;
}

// Sort keys and mates of the sources, and a place for each token.
inline constexpr size_t selection_bytes(int64_t n, int64_t n_src) {
  return shared_bytes<uint64_t>(sort_width(n_src)) + shared_bytes<int>(n_src) + shared_bytes<int>(n);
}

inline constexpr MatchPlan plan_match(int64_t n, int64_t width, int64_t n_src, int64_t n_dst, int64_t n_out,
                                      size_t element_size, bool aligned) {
  MatchPlan plan{};
  plan.warps = plan_warps(n_src, element_size);
  plan.row_tiles = (n_src + plan.warps * 16 - 1) / (plan.warps * 16);
  plan.fused = n <= kFusedTokens && n_src <= kFusedSources;
  plan.shape = plan_sweep(width, element_size, plan.warps, true, aligned);
  plan.match_bytes = sweep_bytes(plan.shape, plan.warps);
  plan.rank_blocks = (n_src + kRankThreads - 1) / kRankThreads;
  plan.sort_width = int(sort_width(n_src));
  plan.order_words = int(order_words(n, n_dst));
  const int warps = plan.fused ? plan.warps : kSlotThreads / 32;
  const size_t before_csr = numbering_bytes(n, n_dst) + (plan.fused ? selection_bytes(n, n_src) : 0);
  plan.csr = plan_csr(n, n_out, warps, kMostSharedBytes - before_csr);
  const size_t ending = before_csr + plan.csr.bytes;
  if (!plan.fused) {
    plan.slot_bytes = ending;
  } else if (ending > plan.match_bytes) {
    plan.match_bytes = ending;
  }
  return plan;
}

// ---- nearest --------------------------------------------------------------------------------------------------------

// The general kernel compares kListRows x kTileColumns rows with plain fp32 arithmetic, kListDepth elements at a time.
constexpr int kListRows = 64, kListDepth = 32, kListThreads = 256;
// Padding that keeps columns of a tile in different banks.
constexpr int kListPitch = kListRows + 4;

inline constexpr size_t list_bytes() {
  return 2 * shared_bytes<float>(kListDepth * kListPitch) + shared_bytes<float>(kListRows * kListPitch) +
         3 * shared_bytes<float>(kListRows);
}

// Whether the tensor cores serve: one best column, and products that keep fp32's accuracy and range. (An fp32 dot
// product does not: an infinity split in two is NaN.)
inline constexpr bool nearest_on_tiles(int64_t k, Similarity similarity, bool is_fp32) {
  return k == 1 && (similarity == Similarity::cosine || (similarity == Similarity::dot && !is_fp32));
}

}  // namespace fastok::cuda
