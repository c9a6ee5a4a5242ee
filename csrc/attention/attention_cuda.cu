// CUDA backend of attention and attention_scores: checks and launches. Kernels are in attention_kernel.cuh and
// scores_kernel.cuh, compiled by element type in attention_<type>.cu.
#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>

#include "attention/attention_launch.h"
#include "common/launch.h"

namespace fastok::cuda {
namespace {

// The last of a tensor's axes, counted from the end.
int64_t size_from_end(const Tensor& x, int64_t axis) { return x.size(x.dim() - axis); }
int64_t stride_from_end(const Tensor& x, int64_t axis) { return x.stride(x.dim() - axis); }

TokenHeads heads_of(const Tensor& x) {
  return {x.const_data_ptr(), x.dim() == 4 ? x.stride(0) : 0, stride_from_end(x, 3), stride_from_end(x, 2)};
}

// Fit for a kernel; a copy where rows do not begin at multiples of 16 bytes, or all tokens are the same one.
Tensor aligned_rows(const Tensor& x, Dtype dtype) {
  const Tensor rows = with_dense_rows(x);
  const bool one_token = stride_from_end(rows, 3) == 0 && size_from_end(rows, 3) > 1;
  if (!one_token && rows_aligned(heads_of(rows), element_size(dtype))) return rows;
  const Tensor packed = torch::stable::contiguous(rows);
  return rows_aligned(heads_of(packed), element_size(dtype)) ? packed : torch::stable::clone(packed);
}

HeadNumbers numbers_of(const std::optional<Tensor>& x, bool packed, const char* name, const Tensor& q) {
  if (!x) return {nullptr, 0, 0, 0};
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, name, " must be float32");
  check_on_device(*x, name, q, "q");
  const bool per_head = x->dim() == (packed ? 2 : 3);
  return {const_data<float>(*x), packed ? 0 : x->stride(0), per_head ? stride_from_end(*x, 2) : 0,
          stride_from_end(*x, 1)};
}

// What both ops are given, checked, with the tensors that the parameters point into.
struct Problem {
  Tensor q, k, offsets_q, offsets_k;
  Dtype dtype;
  Sequences sequences{};
  Window window;
  LogitRule rule;
  HeadNumbers bias;
  int64_t heads, kv_heads, width;

  Problem(const Tensor& q_, const Tensor& k_, double scale, int64_t left, int64_t right, double softcap,
          const std::optional<Tensor>& key_bias, const std::optional<Tensor>& cu_seqlens_q,
          const std::optional<Tensor>& cu_seqlens_k, bool raw)
      : dtype(dtype_of(q_, "q")), window(window_of(left, right)), rule(logit_rule(scale, softcap, raw)) {
    STD_TORCH_CHECK(q_.dim() == 4 || q_.dim() == 3, "q must be [B,S,H,D] or packed [total,H,D]");
    STD_TORCH_CHECK(k_.dim() == q_.dim() && k_.scalar_type() == q_.scalar_type(), "k must have q's dtype and rank");
    const bool packed = q_.dim() == 3;
    STD_TORCH_CHECK(packed == cu_seqlens_q.has_value() && packed == cu_seqlens_k.has_value(),
                    "cu_seqlens_q and cu_seqlens_k go with packed sequences, and only with them");
    heads = size_from_end(q_, 2), kv_heads = size_from_end(k_, 2), width = size_from_end(q_, 1);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "the heads of k must divide those of q");
    STD_TORCH_CHECK(size_from_end(k_, 1) == width, "k must have the head dim of q");
    check_width(width, "q");
    check_on_device(k_, "k", q_, "q");
    const int64_t n_q = size_from_end(q_, 3), n_k = size_from_end(k_, 3), batch = packed ? 1 : q_.size(0);
    STD_TORCH_CHECK(packed || k_.size(0) == batch, "k must have the batch of q");
    for (const int64_t count : {n_q * heads, n_k * heads, batch}) check_countable(count, "tokens times heads");
    STD_TORCH_CHECK(heads < 65536, "q must have less than 65536 heads, got ", heads);
    q = aligned_rows(q_, dtype), k = aligned_rows(k_, dtype);
    sequences.count = int(batch), sequences.n_q = int(n_q), sequences.n_k = int(n_k);
    if (packed) {
      offsets_q = checked_offsets(*cu_seqlens_q, "cu_seqlens_q");
      offsets_k = checked_offsets(*cu_seqlens_k, "cu_seqlens_k");
      STD_TORCH_CHECK(offsets_q.size(0) == offsets_k.size(0), "cu_seqlens_k must have the length of cu_seqlens_q");
      sequences.q_offsets = const_data<int32_t>(offsets_q), sequences.k_offsets = const_data<int32_t>(offsets_k);
      sequences.count = int(offsets_q.size(0) - 1);
    }
    check_grid(batch * ceil_div(std::max(n_q, n_k), 64) * heads + sequences.count, "q");
    check_numbers(key_bias, "key_bias", heads, true);
    bias = numbers_of(key_bias, packed, "key_bias", q);
  }

  bool packed() const { return sequences.packed(); }
  int64_t batch() const { return packed() ? 1 : sequences.count; }

  static void check_width(int64_t width, const char* name) {
    STD_TORCH_CHECK(width % 8 == 0 && width >= 8 && width <= 256, name,
                    " must have a head dim that is a multiple of 8 from 8 to 256; got ", width);
  }
  // [B,T] (if `shared`) or [B,heads,T], packed [total] or [heads,total].
  void check_numbers(const std::optional<Tensor>& x, const char* name, int64_t n_heads, bool shared) const {
    if (!x) return;
    const int64_t n_k = sequences.n_k;
    if (packed()) {
      if (shared && x->dim() == 1) return check_shape(*x, name, {n_k});
      return check_shape(*x, name, {n_heads, n_k});
    }
    if (shared && x->dim() == 2) return check_shape(*x, name, {batch(), n_k});
    check_shape(*x, name, {batch(), n_heads, n_k});
  }
  template <class Params>
  Params params() const {
    Params p{};
    p.q = heads_of(q), p.k = heads_of(k), p.sequences = sequences, p.window = window, p.rule = rule, p.bias = bias;
    p.heads = int(heads), p.group = int(heads / kv_heads), p.width = int(width);
    return p;
  }

 private:
  Tensor checked_offsets(const Tensor& offsets, const char* name) const {
    STD_TORCH_CHECK(offsets.dim() == 1 && offsets.size(0) > 0, name, " must be [sequences + 1]");
    check_on_device(offsets, name, q, "q");
    return checked_contiguous(offsets, ScalarType::Int, name);
  }
};

Tensor floats(const Tensor& like, int64_t count) { return empty_like_device(like, {count}, ScalarType::Float); }

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, int64_t left, int64_t right,
                                     double softcap, std::optional<Tensor> key_bias, std::optional<Tensor> cu_seqlens_q,
                                     std::optional<Tensor> cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const Problem problem(q, k, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, false);
  const int64_t v_width = size_from_end(v, 1), n_q = problem.sequences.n_q, heads = problem.heads;
  STD_TORCH_CHECK(v.dim() == k.dim() && v.scalar_type() == q.scalar_type(), "v must have q's dtype and rank");
  for (int64_t axis = 0; axis + 1 < k.dim(); ++axis)
    STD_TORCH_CHECK(v.size(axis) == k.size(axis), "v must have the tokens and heads of k");
  Problem::check_width(v_width, "v");
  check_on_device(v, "v", q, "q");
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
