// CPU backend of label_tokens: a head's scores are chosen from by the thread that made them, while its caches hold
// them.
#include "sparse/label_tokens_cpu.h"

#include "sparse/label_call_cpu.h"
#include "sparse/select_row_cpu.h"

namespace fastok {

std::tuple<Tensor, Tensor> label_tokens(Tensor q, Tensor data, std::optional<Tensor> scale, Tensor channels,
                                        int64_t kv_heads, bool shared, int64_t k, int64_t sink, int64_t recent,
                                        std::optional<Tensor> seq_lens) {
  const LabelCall call(q, data, scale, channels, kv_heads, shared, seq_lens);
  const int64_t n = call.tokens;
  STD_TORCH_CHECK(0 <= k && k <= n && sink >= 0 && recent >= 0, "k must be within [0, T], sink and recent at least 0");
  STD_TORCH_CHECK(n <= INT32_MAX, "at most 2^31 - 1 tokens, got ", n);
  const Tensor index = empty_like_device(q, {call.batch, call.heads, k}, ScalarType::Long);
  const Tensor count = empty_like_device(q, {call.batch, call.heads}, ScalarType::Long);
  const auto select = [&](const SelectByCount& best, int64_t row, const float* scores) {
    const ScoreRow of_row(scores, call.length(row / call.heads), sink, recent, k);
    fastok::data<int64_t>(count)[row] = best(of_row, fastok::data<int64_t>(index) + row * k);
  };
  const int64_t rows = call.batch * call.heads, grain = 1 + 8192 / (n + 1);
  if (rows < 2 * int64_t(torch::stable::get_num_threads())) {  // several threads to a head
    const Tensor scores = call.scores(q);
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      const SelectByCount best(n, k);
      for (int64_t row = begin; row < end; ++row) select(best, row, const_data<float>(scores) + row * n);
    });
    return {index, count};
  }
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const SelectByCount best(n, k);
    const auto scores = std::make_unique_for_overwrite<float[]>(size_t(n));
    for (int64_t row = begin; row < end; ++row) {
      call.score(row, 0, n, scores.get());
      select(best, row, scores.get());
    }
  });
  return {index, count};
}

}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("label_tokens", TORCH_BOX(&fastok::label_tokens)); }
