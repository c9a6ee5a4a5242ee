// The arguments of an attention op on CUDA, checked and as the kernels take them.
#pragma once
#include <algorithm>

#include "attention/attention_tile.cuh"
#include "common/launch.h"

namespace fastok::cuda {

// The last of a tensor's axes, counted from the end.
inline int64_t size_from_end(const Tensor& x, int64_t axis) { return x.size(x.dim() - axis); }
inline int64_t stride_from_end(const Tensor& x, int64_t axis) { return x.stride(x.dim() - axis); }

inline TokenHeads heads_of(const Tensor& x) {
  return {x.const_data_ptr(), x.dim() == 4 ? x.stride(0) : 0, stride_from_end(x, 3), stride_from_end(x, 2)};
}

// Fit for a kernel; a copy where rows do not begin at multiples of 16 bytes, or all tokens are the same one.
inline Tensor aligned_rows(const Tensor& x, Dtype dtype) {
  const Tensor rows = with_dense_rows(x);
  const bool one_token = stride_from_end(rows, 3) == 0 && size_from_end(rows, 3) > 1;
  if (!one_token && rows_aligned(heads_of(rows), element_size(dtype))) return rows;
  const Tensor packed = torch::stable::contiguous(rows);
  return rows_aligned(heads_of(packed), element_size(dtype)) ? packed : torch::stable::clone(packed);
}

inline HeadNumbers numbers_of(const std::optional<Tensor>& x, bool packed, const char* name, const Tensor& q) {
  if (!x) return {nullptr, 0, 0, 0};
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, name, " must be float32");
  check_on_device(*x, name, q, "q");
  const bool per_head = x->dim() == (packed ? 2 : 3);
  return {const_data<float>(*x), packed ? 0 : x->stride(0), per_head ? stride_from_end(*x, 2) : 0,
          stride_from_end(*x, 1)};
}

// What all ops are given, checked, with the tensors that the parameters point into.
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
  // The width of v, which goes with k.
  int64_t check_values(const Tensor& v) const {
    STD_TORCH_CHECK(v.dim() == k.dim() && v.scalar_type() == q.scalar_type(), "v must have q's dtype and rank");
    for (int64_t axis = 0; axis + 1 < k.dim(); ++axis)
      STD_TORCH_CHECK(v.size(axis) == k.size(axis), "v must have the tokens and heads of k");
    check_width(size_from_end(v, 1), "v");
    check_on_device(v, "v", q, "q");
    return size_from_end(v, 1);
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

inline Tensor floats(const Tensor& like, int64_t count) { return empty_like_device(like, {count}, ScalarType::Float); }

}  // namespace fastok::cuda
