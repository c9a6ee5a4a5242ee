// Shapes of the kernel that decodes packed caches. Pure functions, for host and device. Torch-free.
#pragma once
#include "decode/decode_plan.h"
#include "quantize/kv_format.h"

namespace fastok::cuda {

inline constexpr int packed_width(int64_t width) { return width <= 64 ? 64 : width <= 128 ? 128 : 256; }
// Rows of a page that a warp takes at a time.
FASTOK_HOST_DEVICE constexpr int packed_keys(int width, size_t element_size) {
  return width * int(element_size) > 512 ? 8 : 16;
}

// Pages are split apart from the hot tokens, whose rows are in another basis.
constexpr int kMostPageSplits = 48, kMostHotSplits = kMostDecodeSplits - kMostPageSplits;
// Pages of a split of a head that has n, each of up to `page` tokens.
FASTOK_HOST_DEVICE constexpr int split_pages(int n, int page) {
  const int few = int(ceil_div(kDecodeSplit, page)), even = int(ceil_div(n, kMostPageSplits));
  return few > even ? few : even;
}
// Hot tokens of a split of a head that has n.
FASTOK_HOST_DEVICE constexpr int split_hot(int n) {
  const int even = int(ceil_div(ceil_div(n, kMostHotSplits), 16) * 16);
  return kDecodeSplit > even ? kDecodeSplit : even;
}

// Two segments (packed_cache.cuh).
constexpr size_t kSegmentBytes = 96;

// Bytes of the codes of a warp's rows, wherever they begin.
FASTOK_HOST_DEVICE constexpr int code_tile_bytes(int64_t row_bytes, int keys) {
  return int(ceil_div(row_bytes * keys, 16) * 16) + 16;
}

struct PackedPlan {
  int width;      // of the instance
  int pack;       // query heads that share a block
  int row_tiles;  // blocks that share the rows
  int page_splits, splits;
  int code_bytes[2];  // code_tile_bytes of keys and of values
  size_t bytes;
};

// `pages` and `window`: what a head can have.
inline PackedPlan plan_packed(const KvFormat& fmt, int64_t rows, int group, bool list_per_head, int64_t pages,
                              int64_t window, size_t element_size) {
  PackedPlan plan{};
  plan.width = packed_width(fmt.key.width);
  plan.pack = list_per_head ? 1 : group;
  plan.row_tiles = int(ceil_div(rows * plan.pack, kDecodeRows));
  const int64_t pieces = ceil_div(pages, split_pages(1, int(fmt.page)));
  const int64_t hot = ceil_div(window, split_hot(1));
  plan.page_splits = int(pieces < kMostPageSplits ? pieces : kMostPageSplits);
  plan.splits = plan.page_splits + int(hot < 1 ? 1 : hot < kMostHotSplits ? hot : kMostHotSplits);
  const int keys = packed_keys(plan.width, element_size);
  for (int which = 0; which < 2; ++which)
    plan.code_bytes[which] = code_tile_bytes((which ? fmt.value : fmt.key).row_bytes(true), keys);
  const size_t width = size_t(plan.width), pitch = size_t(tile_pitch(plan.width, element_size));
  const size_t tables = shared_bytes<float>(kMostChannels) + shared_bytes<int16_t>(kMostChannels);
  plan.bytes = shared_bytes<float>(kDecodeRows * width) + (kDecodeRows + size_t(kDecodeWarps * keys)) * pitch +
               size_t(kDecodeWarps * (plan.code_bytes[0] + plan.code_bytes[1])) + 2 * shared_bytes<float>(kDecodeRows) +
               4 * shared_bytes<float>(width) + shared_bytes<int>(kMostPage) + tables + shared_bytes<int>(8) +
               kSegmentBytes;
  const size_t numbers = size_t(kDecodeWarps * kDecodeRows);
  const size_t results = shared_bytes<float>(numbers * size_t(decode_result_pitch(plan.width))) +
                         2 * shared_bytes<float>(numbers) + tables;
  if (plan.bytes < results) plan.bytes = results;
  return plan;
}

}  // namespace fastok::cuda
