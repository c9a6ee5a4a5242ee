// Shapes of the attention kernels: tiles, shared memory, splits over the keys. Pure functions of one sequence's
// problem, never of the batch, for host and device. Torch-free.
#pragma once
#include "common/dtype.h"
#include "common/plan.h"

namespace fastok::cuda {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * 32;

FASTOK_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- tiles ----------------------------------------------------------------------------------------------------------

// What one step of a product takes of a row: the depth of an mma on 16-bit elements.
constexpr int kStepBytes = 32;
FASTOK_HOST_DEVICE constexpr int depth_steps(int64_t width, size_t element_size) {
  return int(ceil_div(width * int64_t(element_size), kStepBytes));
}

// Bytes from one row of a tile to the next. An odd number of 16-byte chunks: the eight rows that ldmatrix or eight
// neighbouring lanes touch at once lie in different banks.
FASTOK_HOST_DEVICE constexpr int tile_pitch(int64_t width, size_t element_size) {
  return depth_steps(width, element_size) * kStepBytes + 16;
}

// Widths of values that there are kernels for; rows are padded with zeros.
inline constexpr int instance_width(int64_t width, size_t element_size) {
  if (element_size == 4) return width <= 64 ? 64 : width <= 128 ? 128 : 256;
  return width <= 32 ? 32 : width <= 64 ? 64 : width <= 96 ? 96 : width <= 128 ? 128 : width <= 192 ? 192 : 256;
}

// Keys of a tile: as many as the shared memory of every device, and a thread's registers, allow. Width 0: no values,
// but keys of any width.
FASTOK_HOST_DEVICE constexpr int key_tile(int tiles, int width, size_t element_size) {
  if (element_size == 2) return width <= (tiles == 2 ? 64 : 192) ? 64 : 32;
  return width == 0 ? 32 : width <= 64 ? 64 : width <= 128 ? 32 : 16;
}
// What a block notes about its rows.
constexpr size_t kBlockRowsBytes = 48;

// ---- forward, and the log-sum-exp alone -----------------------------------------------------------------------------

// A row's result must not depend on what is computed beside it: tiles of keys begin at multiples of their size, and
// keys are split where a sequence has few queries, at places that only its own keys determine.
constexpr int64_t kFewQueries = 64;
constexpr int kSplitKeys = 256, kMostSplits = 64;

// Keys of one split. Up to two splits' worth stay whole.
FASTOK_HOST_DEVICE constexpr int split_keys(int64_t n_k) {
  if (n_k <= 2 * kSplitKeys) return 2 * kSplitKeys;
  const int64_t keys = ceil_div(n_k, kMostSplits);
  return keys <= kSplitKeys ? kSplitKeys : int(ceil_div(keys, 64) * 64);
}

// Splits that sequences of up to n_k keys need.
inline constexpr int most_splits(int64_t n_k) {
  if (n_k <= 2 * kSplitKeys) return 1;
  const int64_t splits = ceil_div(n_k, kSplitKeys);
  return splits < kMostSplits ? int(splits) : kMostSplits;
}

struct AttentionPlan {
  bool sm90;   // by Hopper's kernel (attention_sm90.h); the rest is then not used, but for one split
  int tiles;   // of 16 rows per warp
  int width;   // of the instance
  int pack;    // query heads that share a block, row by row: those of one KV head, or 1
  int splits;  // over the keys
  size_t bytes;
  constexpr int rows() const { return kAttentionWarps * 16 * tiles; }
};

// n_q, n_k: lengths of a sequence, or bounds of them; n_q < 0: not known. v_width 0: the log-sum-exp alone. `pack`: the
// query heads of one KV head, if they may share a block.
inline constexpr AttentionPlan plan_attention(int64_t n_q, int64_t n_k, int pack, int64_t width, int64_t v_width,
                                              size_t element_size) {
  AttentionPlan plan{};
  const bool few = n_q >= 0 && n_q <= kFewQueries;
  plan.width = v_width == 0 ? 0 : instance_width(width > v_width ? width : v_width, element_size);
  plan.pack = few ? pack : 1;
  plan.splits = few ? most_splits(n_k) : 1;
  // Two tiles share what is read of keys and values; more than 128 values per row do not fit in registers twice.
  plan.tiles = element_size == 2 && v_width > 0 && plan.width <= 128 && !few ? 2 : 1;
  const size_t rows = size_t(plan.rows()), keys = size_t(key_tile(plan.tiles, plan.width, element_size));
  const size_t pitch = size_t(tile_pitch(width, element_size));
  const size_t v_pitch = v_width == 0 ? 0 : size_t(tile_pitch(plan.width, element_size));
  plan.bytes = (rows + keys) * pitch + shared_bytes<float>(keys) + keys * v_pitch + kBlockRowsBytes;
  if (plan.bytes < rows * v_pitch) plan.bytes = rows * v_pitch;  // results leave through it
  return plan;
}

// ---- scores ---------------------------------------------------------------------------------------------------------

enum class ScoreReduce { sum, max, none };

FASTOK_HOST_DEVICE constexpr int score_key_tile(size_t element_size) {
  return kAttentionWarps * 16 * (element_size == 2 ? 2 : 1);
}
// Rows of the few-row kernel, and of the other.
constexpr int kFewScoreRows = 16;
FASTOK_HOST_DEVICE constexpr int score_row_tile(size_t element_size) { return element_size == 2 ? 64 : 32; }

struct ScorePlan {
  bool sm90;      // by Hopper's kernel (attention_sm90.h): of the rest, parts and pieces
  bool by_row;    // heads are reduced within a row before rows are: one block walks over all of them
  int row_tile;   // kFewScoreRows or score_row_tile()
  int heads;      // query heads that a block walks over
  int fold;       // of which so many make one column
  int parts;      // blocks that share the rows
  int part_rows;  // rows of each
  int pieces;     // columns that reduce_columns_kernel makes one of; 1: it is not needed
  size_t bytes;
};

inline constexpr size_t score_bytes(int64_t width, size_t element_size, int row_tile) {
  const size_t pitch = size_t(tile_pitch(width, element_size));
  return (size_t(score_key_tile(element_size)) + 2 * size_t(row_tile)) * pitch + 2 * shared_bytes<float>(row_tile) +
         4 * shared_bytes<int>(row_tile);
}

// Blocks that keep a large device busy.
constexpr int64_t kManyBlocks = 512;
constexpr int kPartRows = 512;

// n_rows: selected rows of a sequence, or a bound; n_cols: keys. `group`: query heads of a KV head; `head_group`: of a
// result.
inline constexpr ScorePlan plan_scores(int64_t n_rows, int64_t n_cols, int heads, int group, int head_group,
                                       ScoreReduce reduce, bool head_max, int64_t width, size_t element_size,
                                       bool packed) {
  ScorePlan plan{};
  plan.by_row = reduce == ScoreReduce::none || (head_group > 1 && head_max != (reduce == ScoreReduce::max));
  const bool few = n_rows <= kFewScoreRows || plan.by_row || width > 128;
  plan.row_tile = few ? kFewScoreRows : score_row_tile(element_size);
  // With few rows the keys are what is read: once for all heads of a KV head.
  const bool together = n_rows <= kFewQueries && (head_group == 1 || head_group % group == 0);
  plan.heads = plan.by_row ? head_group : together ? group : 1;
  plan.fold = head_group == 1 ? 1 : plan.heads;
  plan.parts = 1, plan.part_rows = int(n_rows);
  if (reduce != ScoreReduce::none && !packed && n_rows > 2 * kPartRows) {
    const int64_t blocks = ceil_div(n_cols, score_key_tile(element_size)) * (heads / plan.heads);
    const int64_t wanted = ceil_div(kManyBlocks, blocks > 0 ? blocks : 1), most = n_rows / kPartRows;
    plan.part_rows = int(ceil_div(ceil_div(n_rows, wanted < most ? wanted : most), kPartRows) * kPartRows);
    plan.parts = int(ceil_div(n_rows, plan.part_rows));
  }
  plan.pieces = plan.by_row ? plan.parts : head_group / plan.fold * plan.parts;
  plan.bytes = score_bytes(width, element_size, plan.row_tile);
  return plan;
}

// ---- that it fits ---------------------------------------------------------------------------------------------------

inline constexpr bool everything_fits() {
  for (size_t element = 2; element <= 4; element += 2) {
    for (int width = 8; width <= 256; width += 8) {
      for (int n_q = 1; n_q <= 1000; n_q += 999) {
        for (int v_width = 0; v_width <= 256; v_width += 8)
          if (plan_attention(n_q, 1000, 1, width, v_width, element).bytes > kMostSharedBytes) return false;
        if (plan_scores(n_q, 1000, 1, 1, 1, ScoreReduce::sum, false, width, element, false).bytes > kMostSharedBytes)
          return false;
      }
    }
  }
  return true;
}
static_assert(everything_fits());

}  // namespace fastok::cuda
