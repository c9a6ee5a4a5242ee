// Shapes of the decode kernels: tiles, shared memory, splits over the keys. Pure functions of one sequence's problem,
// never of the batch or of what a tensor holds, for host and device. Torch-free.
#pragma once
#include "attention/attention_plan.h"

namespace fastok::cuda {

// A block has one mma's rows; its warps take turns at the keys, each with a softmax of its own.
constexpr int kDecodeWarps = kAttentionWarps, kDecodeThreads = kAttentionThreads;
constexpr int kDecodeRows = 16;

// Keys that a warp takes at a time: about 8 KiB, as copies need that much on their way.
FASTOK_HOST_DEVICE constexpr int decode_keys(int width, size_t element_size) {
  const int bytes = width * int(element_size);
  return bytes <= 256 ? 32 : bytes <= 512 ? 16 : 8;
}

// Keys of one split of a sequence that has n: where the parts lie depends on nothing else.
constexpr int kDecodeSplit = 256, kMostDecodeSplits = 64;
FASTOK_HOST_DEVICE constexpr int decode_split_keys(int n) {
  const int keys = int(ceil_div(n, kMostDecodeSplits));
  return keys <= kDecodeSplit ? kDecodeSplit : int(ceil_div(keys, kDecodeSplit / 2) * (kDecodeSplit / 2));
}
// Splits that sequences of up to `capacity` keys need. The host knows no length.
inline constexpr int decode_splits(int64_t capacity) {
  const int64_t splits = ceil_div(capacity, kDecodeSplit);
  return splits < 1 ? 1 : splits < kMostDecodeSplits ? int(splits) : kMostDecodeSplits;
}

// Floats from one row of a warp's result to the next, in shared memory.
FASTOK_HOST_DEVICE constexpr int decode_result_pitch(int width) { return width + 4; }

struct DecodePlan {
  int width;      // of the instance
  int pack;       // query heads that share a block: those of one KV head, or 1 if they have lists of their own
  int row_tiles;  // blocks that share the rows
  int splits;
  size_t bytes;
};

// `rows` of each head; `capacity`: keys that a sequence, or a list of tokens, can have.
inline constexpr DecodePlan plan_decode(int64_t rows, int group, bool list_per_head, int64_t width, int64_t v_width,
                                        int64_t capacity, size_t element_size) {
  DecodePlan plan{};
  plan.width = instance_width(width > v_width ? width : v_width, element_size);
  plan.pack = list_per_head ? 1 : group;
  plan.row_tiles = int(ceil_div(rows * plan.pack, kDecodeRows));
  plan.splits = decode_splits(capacity);
  const size_t keys = size_t(kDecodeWarps * decode_keys(plan.width, element_size));
  const size_t pitch = size_t(tile_pitch(width, element_size)), v_pitch = size_t(tile_pitch(plan.width, element_size));
  const size_t tiles = kDecodeRows * pitch + keys * (pitch + v_pitch);
  const size_t numbers = size_t(kDecodeWarps * kDecodeRows);
  const size_t results =
      shared_bytes<float>(numbers * size_t(decode_result_pitch(plan.width))) + 2 * shared_bytes<float>(numbers);
  plan.bytes = tiles > results ? tiles : results;
  return plan;
}

// Threads that put one list of tokens in order.
constexpr int kOrderThreads = 512;

}  // namespace fastok::cuda
