// One head's tokens by their scores: what is forced, and the best of the others.
#pragma once
#include <algorithm>
#include <memory>

#include "common/tensor.h"
#include "sparse/select_tokens.h"

namespace fastok {

// A head's scores, its forced tokens first: [0, sink) and [end, length); the others compete.
struct ScoreRow {
  const float* score;
  int64_t length, sink, end;

  ScoreRow(const float* score, int64_t length, int64_t sink_in, int64_t recent, int64_t k)
      : score(score), length(length), sink(std::min(sink_in, length)), end(std::max(length - recent, sink)) {
    STD_TORCH_CHECK(forced() <= k || length <= k, "k must have room for sink + recent tokens");
  }
  int64_t forced() const { return sink + length - end; }
};

// The best k tokens of one head after another, of up to n tokens each.
class SelectByCount {
 public:
  // Not cleared: of the memory for the worst case, little is touched.
  SelectByCount(int64_t n, int64_t k)
      : kernels_(pick_select_tokens_kernels()),
        k_(k),
        best_(std::make_unique_for_overwrite<int32_t[]>(size_t(k))),
        scratch_(std::make_unique_for_overwrite<uint32_t[]>(size_t(largest_scratch(n)))) {}

  // Their places, ascending, into index[k], padded with -1; returns how many there are.
  int64_t operator()(const ScoreRow& row, int64_t* index) const {
    const int64_t rest = row.end - row.sink, m = std::min(k_ - row.forced(), rest);
    int64_t count = 0;
    for (int64_t t = 0; t < row.sink; ++t) index[count++] = t;
    if (m > 0) {
      kernels_.largest(row.score + row.sink, rest, m, best_.get(), scratch_.get());
      for (int64_t i = 0; i < m; ++i) index[count++] = row.sink + best_[size_t(i)];
    }
    for (int64_t t = row.end; t < row.length; ++t) index[count++] = t;
    std::fill(index + count, index + k_, -1);
    return count;
  }

 private:
  const SelectTokensKernels& kernels_;
  int64_t k_;
  std::unique_ptr<int32_t[]> best_;
  std::unique_ptr<uint32_t[]> scratch_;
};

}  // namespace fastok
