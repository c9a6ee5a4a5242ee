// CPU backend of select_tokens: forced tokens, lengths, shares of the sum; the selection is in select_tokens_simd.cpp.
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "sparse/select_row_cpu.h"

namespace fastok {
namespace {

// The fewest tokens that reach the share, at most k; sums in fp64 in the order of the tokens taken.
int64_t by_mass(const ScoreRow& row, int64_t k, double mass, int64_t* index) {
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
  std::fill(index + count, index + k, -1);
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
  torch::stable::parallel_for(0, batch * heads, 1 + 8192 / (n + 1), [&](int64_t begin, int64_t end) {
    const SelectByCount best(n, k);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tokens = length ? std::clamp<int64_t>(length[i / heads], 0, n) : n;
      const ScoreRow row(const_data<float>(scores) + i * n, tokens, sink, recent, k);
      int64_t* const out = data<int64_t>(index) + i * k;
      data<int64_t>(count)[i] = mass ? by_mass(row, k, *mass, out) : best(row, out);
    }
  });
  return {index, count};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("select_tokens", TORCH_BOX(&fastok::select_tokens)); }
