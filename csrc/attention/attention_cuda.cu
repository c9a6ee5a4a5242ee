// CUDA backend of attention and attention_scores: checks and launches. Kernels are in attention_kernel.cuh and
// scores_kernel.cuh, compiled by element type in attention_<type>.cu.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>

#include "attention/attention_launch.h"
#include "attention/call_cuda.h"

namespace fastok::cuda {
namespace {

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, int64_t left, int64_t right,
                                     double softcap, std::optional<Tensor> key_bias, std::optional<Tensor> cu_seqlens_q,
                                     std::optional<Tensor> cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const Problem problem(q, k, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, false);
  const int64_t v_width = problem.check_values(v), n_q = problem.sequences.n_q, heads = problem.heads;
  const Tensor values = aligned_rows(v, problem.dtype);

  const bool packed = problem.packed();
  const Tensor out = packed ? empty_like_device(q, {n_q, heads, v_width}, q.scalar_type())
                            : empty_like_device(q, {q.size(0), n_q, heads, v_width}, q.scalar_type());
  const Tensor lse = packed ? empty_like_device(q, {heads, n_q}, ScalarType::Float)
                            : empty_like_device(q, {q.size(0), heads, n_q}, ScalarType::Float);
  auto p = problem.params<AttentionParams>();
  p.v = heads_of(values), p.v_width = int(v_width);
  p.rows = {nullptr, 0, packed ? kFarAway : int(n_q)};
  p.out = out.mutable_data_ptr(), p.lse = data<float>(lse);
  p.lse_head_stride = n_q, p.lse_batch_stride = n_q * heads, p.lse_rows = problem.batch() * p.lse_batch_stride;
  if (p.lse_rows == 0) return {out, lse};

  const AttentionPlan plan = plan_for(p, problem.dtype, max_seqlen_q, max_seqlen_k, capability_of(q));
  Tensor split_out, split_lse;
  if (plan.splits > 1) {
    split_out = floats(q, plan.splits * p.lse_rows * v_width), split_lse = floats(q, plan.splits * p.lse_rows);
    p.split_out = data<float>(split_out), p.split_lse = data<float>(split_lse);
  }
  run_attention(Launcher(q), problem.dtype, plan, p);
  return {out, lse};
}

// So many rows [begin:end] can take of a sequence, if it has `length` or fewer.
int64_t most_rows(int64_t begin, int64_t end, int64_t length) {
  if ((begin < 0) == (end < 0)) return std::min(std::max<int64_t>(end - begin, 0), length);
  return begin < 0 ? std::min(-begin, length) : length;
}

Tensor attention_scores(Tensor q, Tensor k, std::optional<Tensor> lse, std::optional<Tensor> key_weight, double scale,
                        int64_t left, int64_t right, double softcap, std::optional<Tensor> key_bias,
                        std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, int64_t max_seqlen_q,
                        int64_t max_seqlen_k, std::optional<Tensor> rows, int64_t row_begin, int64_t row_end,
                        int64_t col_begin, int64_t col_end, bool over_cols, std::string reduce, int64_t head_group,
                        bool head_max, bool logits) {
  const Problem problem(q, k, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, logits);
  const bool packed = problem.packed();
  const int64_t n_q = problem.sequences.n_q, n_k = problem.sequences.n_k;
  STD_TORCH_CHECK(0 <= col_begin && col_begin <= col_end && col_end <= n_k, "columns must be within [0, T]");
  STD_TORCH_CHECK(!packed || (col_begin == 0 && col_end == n_k), "packed sequences have all columns or none");
  STD_TORCH_CHECK(head_group > 0 && problem.heads % head_group == 0, "head_group must divide the heads of q");
  STD_TORCH_CHECK(reduce == "sum" || reduce == "max" || reduce == "none", "reduce must be sum, max or none");
  constexpr int64_t kEnd = (int64_t(1) << 31) - 1;
  STD_TORCH_CHECK(std::abs(row_begin) <= kEnd && std::abs(row_end) <= kEnd, "rows must be within 32 bits");

  auto p = problem.params<ScoreParams>();
  p.logits = logits, p.head_max = head_max, p.head_group = int(head_group);
  p.reduce = reduce == "sum" ? ScoreReduce::sum : reduce == "max" ? ScoreReduce::max : ScoreReduce::none;
  p.col_begin = int(col_begin), p.col_end = int(col_end), p.n_cols = int(col_end - col_begin);
  Tensor list;
  int64_t n_rows = packed ? most_rows(row_begin, row_end, kEnd) : row_end - row_begin;
  if (rows) {
    STD_TORCH_CHECK(rows->dim() == 1, "rows must be [R]");
    check_on_device(*rows, "rows", q, "q");
    list = checked_contiguous(*rows, ScalarType::Long, "rows");
    n_rows = list.size(0);
    p.rows = {const_data<int64_t>(list), 0, int(n_rows)};
  } else {
    STD_TORCH_CHECK(packed || (0 <= row_begin && row_begin <= row_end && row_end <= n_q), "rows must be within [0, S]");
    p.rows = {nullptr, int(row_begin), int(row_end)};
  }
  const bool keeps_rows = p.reduce == ScoreReduce::none;
  STD_TORCH_CHECK(!keeps_rows || n_rows < (int64_t(1) << 30), "rows must be a known number for reduce none");
  p.n_rows = int(rows || keeps_rows ? n_rows : std::min(n_rows, n_q));

  problem.check_numbers(key_weight, "key_weight", problem.kv_heads, false);
  p.weight = numbers_of(key_weight, packed, "key_weight", q);
  const int64_t out_heads = problem.heads / head_group, n_cols = p.n_cols;
  const auto result = [&](std::initializer_list<int64_t> shape) {
    return empty_like_device(q, shape, ScalarType::Float);
  };
  const Tensor out = packed       ? keeps_rows ? result({out_heads, n_rows, n_cols}) : result({out_heads, n_cols})
                     : keeps_rows ? result({q.size(0), out_heads, n_rows, n_cols})
                                  : result({q.size(0), out_heads, n_cols});
  p.out = data<float>(out);
  if (out.numel() == 0) return out;

  Launcher launch(q);
  Tensor row_lse, split_lse, pieces;
  if (!logits && (!lse || over_cols)) {
    AttentionParams pass = lse_pass(p, over_cols);
    const AttentionPlan plan = plan_for(pass, problem.dtype, max_seqlen_q, max_seqlen_k, capability_of(q));
    row_lse = floats(q, pass.lse_rows);
    pass.lse = data<float>(row_lse);
    if (plan.splits > 1) {
      split_lse = floats(q, plan.splits * pass.lse_rows);
      pass.split_lse = data<float>(split_lse);
    }
    if (pass.lse_rows > 0) run_attention(launch, problem.dtype, plan, pass);
    use_lse(p, pass);
  } else if (lse) {
    if (packed) {
      check_shape(*lse, "lse", {problem.heads, n_q});
    } else {
      check_shape(*lse, "lse", {problem.batch(), problem.heads, n_q});
    }
    p.lse = numbers_of(lse, packed, "lse", q);
  }
  const ScorePlan plan = plan_for(p, problem.dtype, capability_of(q));
  if (plan.pieces > 1) pieces = floats(q, pieces_size(p, plan));
  run_scores(launch, problem.dtype, plan, plan.pieces > 1 ? data<float>(pieces) : nullptr, p);
  return out;
}

}  // namespace
}  // namespace fastok::cuda

// For `fastok info`.
extern "C" __attribute__((visibility("default"))) bool fastok_has_sm90() { return fastok::cuda::kHasSm90; }

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) {
  m.impl("attention", TORCH_BOX(&fastok::cuda::attention));
  m.impl("attention_scores", TORCH_BOX(&fastok::cuda::attention_scores));
}
