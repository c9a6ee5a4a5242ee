// Shapes of the label score kernel. Pure functions of the problem, for host and device. Torch-free.
#pragma once
#include "common/plan.h"

namespace fastok::cuda {

constexpr int kLabelThreads = 128;
constexpr int kMostChannels = 256;

// Tokens of a thread: 16 bytes of codes.
FASTOK_HOST_DEVICE constexpr int label_tokens(size_t code_size) { return int(16 / code_size); }

// Blocks of a multiprocessor for which a thread's sums fit in registers.
FASTOK_HOST_DEVICE constexpr int label_blocks(int sums) { return sums >= 64 ? 3 : 5; }

// Queries that read a label together: all that one label serves, if they are few.
inline constexpr int queries_at_once(int64_t queries) { return queries == 1 ? 1 : 4; }

// Queries whose channels a block holds: a multiple of those read together, and all of them if they fit.
inline constexpr int queries_held(int64_t queries, int64_t r) {
  constexpr int64_t kFloats = 8192;
  const int64_t step = queries_at_once(queries), padded = (queries + step - 1) / step * step;
  const int64_t most = kFloats / (r > 0 ? r : 1) / step * step;
  return int(padded < most ? padded : most);
}

inline constexpr size_t label_bytes(int held, int64_t r) { return shared_bytes<float>(size_t(held) * size_t(r)); }

}  // namespace fastok::cuda
