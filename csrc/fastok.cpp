// Every operator schema of fastok, and nothing else. Kernels register themselves per device next to their code;
// validation, fake kernels and autograd live in python/fastok/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastok, m) {
  // Matching (csrc/match). A map is (assign[B,N], counts[B], offsets[B,M+1], members[B,N]), all int32.
  m.def(
      "bipartite_match(Tensor metric, SymInt r, SymInt protect, float? threshold, Tensor? bias, Tensor? src, "
      "Tensor? dst, bool sorted_order, bool static_shape) -> (Tensor assign, Tensor counts, Tensor offsets, "
      "Tensor members)");
  m.def("nearest(Tensor x, Tensor y, SymInt k, str similarity, Tensor? mask) -> (Tensor value, Tensor index)");

  // Selection (csrc/select). top_tokens: k holds one budget per segment. sample_cdf: a map as above.
  m.def(
      "top_tokens(Tensor scores, SymInt[] k, SymInt protect, Tensor? mask, Tensor? segments, bool by_score) -> Tensor");
  m.def(
      "sample_cdf(Tensor scores, SymInt k, SymInt protect) -> (Tensor assign, Tensor counts, Tensor offsets, "
      "Tensor members)");
  m.def("density_peaks(Tensor x, SymInt k, SymInt neighbors) -> Tensor");

  // Merging (csrc/merge).
  m.def("build_map(Tensor assign, SymInt n_out) -> (Tensor offsets, Tensor members)");
  m.def(
      "merge(Tensor x, Tensor assign, Tensor offsets, Tensor members, Tensor? size, str mode) -> "
      "(Tensor y, Tensor size_out)");
  m.def(
      "merge_backward(Tensor grad_y, Tensor x, Tensor y, Tensor assign, Tensor offsets, Tensor members, "
      "Tensor? size, Tensor size_out, str mode) -> Tensor");
  m.def("unmerge(Tensor y, Tensor assign, Tensor offsets, Tensor members, Tensor? residual) -> Tensor");

  // Attention (csrc/attention). left, right < 0: unbounded; softcap 0: none; max_seqlen < 0: unknown.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, float scale, SymInt left, SymInt right, float softcap, "
      "Tensor? key_bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "float scale, SymInt left, SymInt right, float softcap, Tensor? key_bias, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_scores(Tensor q, Tensor k, Tensor? lse, Tensor? key_weight, float scale, SymInt left, SymInt right, "
      "float softcap, Tensor? key_bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, Tensor? rows, SymInt row_begin, SymInt row_end, SymInt col_begin, SymInt col_end, "
      "bool over_cols, str reduce, SymInt head_group, bool head_max, bool logits) -> Tensor");
  m.def(
      "attention_with_scores(Tensor q, Tensor k, Tensor v, Tensor? key_weight, float scale, SymInt left, SymInt right, "
      "float softcap, Tensor? key_bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, "
      "SymInt max_seqlen_k, Tensor? rows, SymInt row_begin, SymInt row_end, SymInt col_begin, SymInt col_end, "
      "bool over_cols, str reduce, str heads, bool logits) -> (Tensor out, Tensor lse, Tensor scores)");
  m.def(
      "label_scores(Tensor q, Tensor data, Tensor? scale, Tensor channels, int kv_heads, bool shared, Tensor? "
      "seq_lens) "
      "-> Tensor");
  m.def(
      "select_tokens(Tensor scores, SymInt k, float? mass, SymInt sink, SymInt recent, Tensor? seq_lens) -> (Tensor "
      "index, Tensor count)");
  m.def(
      "label_tokens(Tensor q, Tensor data, Tensor? scale, Tensor channels, int kv_heads, bool shared, SymInt k, SymInt "
      "sink, SymInt recent, Tensor? seq_lens) -> (Tensor index, Tensor count)");
  m.def(
      "double_sparse_decode(Tensor q, Tensor k, Tensor v, Tensor? seq_lens, Tensor? block_table, float scale, float "
      "softcap, Tensor data, Tensor? label_scale, Tensor channels, int kv_heads, bool shared, SymInt n_keep, SymInt "
      "sink, SymInt recent) -> (Tensor out, Tensor lse, Tensor tokens)");
  m.def("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor out, Tensor lse)");

  // Selection (csrc/k_center, csrc/max_coverage). start is isolated, norm, first, or given with `first`;
  // candidates_scored 0: planned. max_coverage gets similarity, or y and x.
  m.def(
      "k_center(Tensor x, SymInt k, str metric, str objective, str start, Tensor? first, Tensor? mask, "
      "SymInt candidates_scored) -> (Tensor index, Tensor distance)");
  m.def(
      "max_coverage(Tensor? similarity, Tensor? y, Tensor? x, SymInt k, Tensor? modular) -> "
      "(Tensor index, Tensor gain)");
  // Packed caches (csrc/quantize, csrc/decode). `fmt` as fastok::KvFormat::of reads it; softcap 0: none.
  m.def(
      "kv_seal(Tensor(a!) data, Tensor offset, Tensor k, Tensor v, Tensor? classes, Tensor? key_channels, "
      "Tensor? value_channels, int[] fmt, float key_gamma, float value_gamma) -> ()");
  m.def(
      "kv_unseal(Tensor data, Tensor offset, Tensor counts, Tensor? classes, Tensor? key_channels, "
      "Tensor? value_channels, Tensor hot_k, Tensor hot_v, Tensor hot_len, int[] fmt, SymInt total) -> "
      "(Tensor k, Tensor v)");
  m.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor? seq_lens, Tensor? block_table, float scale, float softcap, "
      "Tensor? key_bias, Tensor? tokens) -> (Tensor out, Tensor lse)");
  m.def(
      "decode_packed(Tensor q, Tensor data, Tensor offset, Tensor counts, Tensor? classes, Tensor? key_channels, "
      "Tensor? value_channels, Tensor hot_k, Tensor hot_v, Tensor hot_len, int[] fmt, float scale, float softcap, "
      "Tensor? key_bias, Tensor? tokens) -> (Tensor out, Tensor lse)");
}
