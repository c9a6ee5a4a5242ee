// CUDA backend of decode over dense and paged caches: checks and launches. Kernels are in decode_kernel.cuh.
#include <tuple>

#include "decode/decode_call_cuda.h"

namespace fastok::cuda {
namespace {

std::tuple<Tensor, Tensor> decode(Tensor q, Tensor k, Tensor v, std::optional<Tensor> seq_lens,
                                  std::optional<Tensor> block_table, double scale, double softcap,
                                  std::optional<Tensor> key_bias, std::optional<Tensor> tokens) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have four dimensions");
  const Dtype dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "k and v must have q's dtype");
  const int64_t batch = q.size(0), rows = q.size(1), heads = q.size(2), width = q.size(3);
  const int64_t groups = k.size(2), v_width = v.size(3), page = k.size(1);
  const int64_t total = block_table ? block_table->size(1) * page : page;
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "the heads of k must divide those of q");
  STD_TORCH_CHECK(block_table || k.size(0) == batch, "k must have the batch of q");
  check_shape(k, "k", {k.size(0), page, groups, width});
  check_shape(v, "v", {k.size(0), page, groups, v_width});
  Problem::check_width(width, "q");
  Problem::check_width(v_width, "v");
  check_on_device(k, "k", q, "q");
  check_on_device(v, "v", q, "q");
  check_countable(total, "T");
  check_countable(k.size(0), "pages");
  check_countable(rows * heads, "q's rows times heads");
  const Tensor out = empty_like_device(q, {batch, rows, heads, v_width}, q.scalar_type());
  const Tensor lse = empty_like_device(q, {batch, heads, rows}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  check_grid(batch * heads * (rows + 1), "q");

  DecodeParams p{};
  const Tensor queries = aligned_rows(q, dtype), keys = aligned_rows(k, dtype), values = aligned_rows(v, dtype);
  p.q = heads_of(queries), p.k = heads_of(keys), p.v = heads_of(values);
  p.rule = logit_rule(scale, softcap, false);
  p.rows = int(rows), p.heads = int(heads), p.group = int(heads / groups);
  p.width = int(width), p.v_width = int(v_width), p.page = int(page), p.pages = int(k.size(0));
  p.total = int(total);
  if (block_table) {
    check_shape(*block_table, "block_table", {batch, block_table->size(1)});
    check_on_device(*block_table, "block_table", q, "q");
    const ScalarType entries = block_table->scalar_type();
    STD_TORCH_CHECK(entries == ScalarType::Int || entries == ScalarType::Long, "block_table must be int32 or int64");
    p.table = {block_table->const_data_ptr(), entries == ScalarType::Long};
    p.table_batch_stride = block_table->stride(0), p.table_stride = block_table->stride(1);
  }
  Tensor lengths;
  if (seq_lens) {
    p.lengths_by_head = seq_lens->dim() == 2;
    if (p.lengths_by_head) {
      check_shape(*seq_lens, "seq_lens", {batch, groups});
    } else {
      check_shape(*seq_lens, "seq_lens", {batch});
    }
    p.lengths = integers_of(*seq_lens, "seq_lens", q, lengths);
  }
  if (key_bias) {
    if (key_bias->dim() == 3) {
      check_shape(*key_bias, "key_bias", {batch, heads, total});
    } else {
      check_shape(*key_bias, "key_bias", {batch, total});
    }
    p.bias = numbers_of(key_bias, false, "key_bias", q);
  }
  Launcher launch(q);
  OrderedTokens ordered;
  if (tokens) ordered.order(launch, *tokens, q, p);
  p.out = out.mutable_data_ptr(), p.lse = data<float>(lse), p.lse_rows = lse.numel();
  const DecodePlan plan = plan_for(p, dtype);
  SplitParts parts(q, plan.splits, p);
  run_decode(launch, dtype, batch, plan, p);
  return {out, lse};
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) { m.impl("decode", TORCH_BOX(&fastok::cuda::decode)); }
