// CPU backend of select_tokens: forced tokens, lengths, shares of the sum; the selection is in select_tokens_simd.cpp.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "sparse/select_tokens.h"

namespace fastok {
namespace {

struct Selection {
  int64_t k, sink, recent;
  std::optional<double> mass;
};

// A head's row, its forced tokens first: [0, sink) and [end, length); the others compete.
struct Row {
  const float* score;
  int64_t length, sink, end;

  Row(const float* score, int64_t length, const Selection& wanted)
      : score(score),
        length(length),
        sink(std::min(wanted.sink, length)),
        end(std::max(length - wanted.recent, sink)) {}
  int64_t forced() const { return sink + length - end; }
};

int64_t by_count(const Row& row, int64_t k, int64_t* index, int32_t* best, uint32_t* scratch) {
  const int64_t rest = row.end - row.sink, m = std::min(k - row.forced(), rest);
  int64_t count = 0;
  for (int64_t t = 0; t < row.sink; ++t) index[count++] = t;
  if (m > 0) {
    pick_select_tokens_kernels().largest(row.score + row.sink, rest, m, best, scratch);
    for (int64_t i = 0; i < m; ++i) index[count++] = row.sink + best[i];
  }
  for (int64_t t = row.end; t < row.length; ++t) index[count++] = t;
  return count;
}

// The fewest tokens that reach the share, at most k; sums in fp64 in the order of the tokens taken.
int64_t by_mass(const Row& row, int64_t k, double mass, int64_t* index) {
  const auto share = [&](int64_t t) { return row.score[t] > 0 ? double(row.score[t]) : 0.0; };
  const auto value = [&](int64_t t) { return std::isnan(row.score[t]) ? -INFINITY : row.score[t]; };
  const auto better = [&](int64_t a, int64_t b) { return value(a) > value(b); };
  std::vector<int64_t> order(static_cast<size_t>(row.length));
  std::iota(order.begin(), order.begin() + row.sink, 0);
  std::iota(order.begin() + row.sink, order.begin() + row.forced(), row.end);
  std::iota(order.begin() + row.forced(), order.end(), row.sink);
  std::stable_sort(order.begin(), order.begin() + row.forced(), better);
  std::stable_sort(order.begin() + row.forced(), order.end(), better);
  double total = 0, before = 0;
  for (int64_t t = 0; t < row.length; ++t) total += share(t);
  int64_t count = 0;
  for (const int64_t t : order) {
    if (count == k || (count >= row.forced() && !(before < mass * total))) break;
    before += share(t);
    index[count++] = t;
  }
  std::sort(index, index + count);
  return count;
}

std::tuple<Tensor, Tensor> select_tokens(Tensor scores, int64_t k, std::optional<double> mass, int64_t sink,
                                         int64_t recent, std::optional<Tensor> seq_lens) {
  STD_TORCH_CHECK(scores.dim() == 3, "scores must be [B,G,T]");
  scores = checked_contiguous(scores, ScalarType::Float, "scores");
  const int64_t batch = scores.size(0), heads = scores.size(1), n = scores.size(2);
  STD_TORCH_CHECK(0 <= k && k <= n && sink >= 0 && recent >= 0, "k must be within [0, T], sink and recent at least 0");
  STD_TORCH_CHECK(n <= INT32_MAX, "at most 2^31 - 1 tokens, got ", n);
  Tensor lengths;
  if (seq_lens) {
    lengths = torch::stable::to(*seq_lens, ScalarType::Long);
    lengths = checked_contiguous(lengths, ScalarType::Long, "seq_lens");
    STD_TORCH_CHECK(lengths.numel() == batch, "seq_lens must be [B]");
  }
  const int64_t* length = seq_lens ? const_data<int64_t>(lengths) : nullptr;
  const Tensor index = empty_like_device(scores, {batch, heads, k}, ScalarType::Long);
  const Tensor count = empty_like_device(scores, {batch, heads}, ScalarType::Long);
  const Selection wanted{k, sink, recent, mass};
  torch::stable::parallel_for(0, batch * heads, 1 + 8192 / (n + 1), [&](int64_t begin, int64_t end) {
    // Not cleared: of the memory for the worst case, little is touched.
    const auto best = std::make_unique_for_overwrite<int32_t[]>(size_t(k));
    const auto scratch = std::make_unique_for_overwrite<uint32_t[]>(size_t(largest_scratch(n)));
    for (int64_t i = begin; i < end; ++i) {
      int64_t* const out = data<int64_t>(index) + i * k;
      const int64_t tokens = length ? std::clamp<int64_t>(length[i / heads], 0, n) : n;
      const Row row(const_data<float>(scores) + i * n, tokens, wanted);
      STD_TORCH_CHECK(row.forced() <= k || row.length <= k, "k must have room for sink + recent tokens");
      const int64_t found = mass ? by_mass(row, k, *mass, out) : by_count(row, k, out, best.get(), scratch.get());
      std::fill(out + found, out + k, -1);
      data<int64_t>(count)[i] = found;
    }
  });
  return {index, count};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("select_tokens", TORCH_BOX(&fastok::select_tokens)); }
