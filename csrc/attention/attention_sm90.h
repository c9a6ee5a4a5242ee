// Attention on Hopper (sm_90a): which calls its kernels serve, and their shapes. Pure functions of one sequence's
// problem, never of the batch, for host and device. Torch-free.
#pragma once
#include "attention/attention_plan.h"

namespace fastok::cuda::sm90 {

// ---- who serves a call ----------------------------------------------------------------------------------------------

// What of a call decides. Lengths are those of a sequence, or bounds of them; negative: not known.
struct Problem {
  int capability;  // of the device: 90 is Hopper's
  int64_t n_q, n_k, width, v_width;
  size_t element_size;
  double scale, softcap;
};

// Widths of keys and values that there are kernels for; rows are padded with zeros as they are copied. 0: none.
inline constexpr int instance_width(int64_t width, int64_t v_width) {
  const int64_t wider = width > v_width ? width : v_width;
  return wider > 32 && wider <= 64 ? 64 : wider > 96 && wider <= 128 ? 128 : 0;
}

// Few queries leave most of a tile empty, and do better with split keys. Logits are scaled as they are exponentiated,
// so that the largest product must be the largest logit.
inline constexpr bool serves_forward(const Problem& p) {
  return p.capability == 90 && p.element_size == 2 && instance_width(p.width, p.v_width) > 0 && p.n_k != 0 &&
         (p.n_q < 0 || p.n_q > kFewQueries) && p.scale > 0 && p.softcap == 0;
}

// Sums over a range of rows, each by its finished log-sum-exp. n_q: how many rows are selected.
inline constexpr bool serves_scores(const Problem& p, ScoreReduce reduce, bool logits, bool listed, bool by_row) {
  return serves_forward(p) && reduce == ScoreReduce::sum && !logits && !listed && !by_row;
}

// ---- shapes ---------------------------------------------------------------------------------------------------------

// A block is one warpgroup that copies, and some that compute: 64 rows (of queries or, for scores, of keys) each.
constexpr int kGroupThreads = 128, kGroupRows = 64;
// Keys of a tile; for scores queries.
constexpr int kTile = 128;
constexpr int kScoreGroups = 2;
static_assert(kScoreGroups * kGroupRows == score_key_tile(2));

FASTOK_HOST_DEVICE constexpr int groups(int width) { return width == 64 ? 3 : 2; }
FASTOK_HOST_DEVICE constexpr int threads(int n_groups) { return (1 + n_groups) * kGroupThreads; }
// Tiles of keys, and as many of values, that are under way; tiles of queries for scores.
FASTOK_HOST_DEVICE constexpr int stages(int width) { return width == 64 ? 4 : 2; }
FASTOK_HOST_DEVICE constexpr int score_stages(int width) { return width == 64 ? 6 : 4; }
// What the copying warpgroup keeps of its registers, and the others have: 64 Ki for all.
FASTOK_HOST_DEVICE constexpr int copy_registers(int n_groups) { return n_groups == 2 ? 40 : 32; }
FASTOK_HOST_DEVICE constexpr int compute_registers(int n_groups) { return n_groups == 2 ? 232 : 160; }
static_assert(40 + 2 * 232 <= 512 && 32 + 3 * 160 <= 512);

FASTOK_HOST_DEVICE constexpr size_t tile_bytes(int rows, int width) { return size_t(rows) * size_t(width) * 2; }
constexpr size_t kBarrierBytes = 8;

constexpr size_t forward_bytes(int width) {
  const int rows = groups(width) * kGroupRows, n = stages(width);
  return tile_bytes(rows + 2 * n * kTile, width) + shared_bytes<float>(size_t(n) * kTile) +
         shared_bytes<char>((1 + 4 * size_t(n)) * kBarrierBytes);
}
constexpr size_t scores_bytes(int width) {
  const int n = score_stages(width);
  return tile_bytes((1 + n) * kTile, width) + shared_bytes<float>(size_t(n) * kTile) +
         shared_bytes<char>((1 + 2 * size_t(n)) * kBarrierBytes);
}
constexpr size_t kMostSharedBytes = 227 << 10;  // of a block
static_assert(forward_bytes(64) <= kMostSharedBytes && forward_bytes(128) <= kMostSharedBytes);
static_assert(scores_bytes(64) <= kMostSharedBytes && scores_bytes(128) <= kMostSharedBytes);

}  // namespace fastok::cuda::sm90
