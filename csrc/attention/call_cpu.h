// The arguments of an attention op on the CPU: checks, and one head of one sequence at a time.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>

#include "attention/attention.h"
#include "common/tensor.h"

namespace fastok {

struct AttentionCall {
  Tensor q, k, v, bias, cu_q, cu_k;
  Dtype dtype;
  bool packed, per_head_bias = false, has_bias, has_values;
  int64_t sequences, heads, groups, width, v_width = 0, total_q, total_k;  // totals: of one batch entry
  float scale, softcap;
  int64_t left, right;

  AttentionCall(const Tensor& q_in, const Tensor& k_in, const std::optional<Tensor>& v_in, double scale_in,
                int64_t left_in, int64_t right_in, double softcap_in, const std::optional<Tensor>& key_bias,
                const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_k)
      : q(with_dense_rows(q_in)),
        k(with_dense_rows(k_in)),
        dtype(dtype_of(q_in, "q")),
        packed(cu_seqlens_q.has_value()),
        has_bias(key_bias.has_value()),
        has_values(v_in.has_value()),
        scale(float(scale_in)),
        softcap(float(softcap_in)),
        left(left_in),
        right(right_in) {
    STD_TORCH_CHECK(cu_seqlens_k.has_value() == packed, "cu_seqlens_q and cu_seqlens_k go together");
    const int64_t dims = packed ? 3 : 4;
    STD_TORCH_CHECK(q.dim() == dims && k.dim() == dims, "q and k must be [B,S,H,D], or [total,H,D] with cu_seqlens");
    heads = q.size(dims - 2);
    groups = k.size(dims - 2);
    width = q.size(dims - 1);
    total_q = q.size(dims - 3);
    total_k = k.size(dims - 3);
    STD_TORCH_CHECK(k.size(dims - 1) == width && width <= 256, "q and k must have one head dim, at most 256");
    STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "k must have a number of heads that divides those of q");
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type(), "q and k must have one dtype");
    STD_TORCH_CHECK(packed || k.size(0) == q.size(0), "q and k must have one batch size");
    if (has_values) {
      v = with_dense_rows(*v_in);
      STD_TORCH_CHECK(v.dim() == dims && v.scalar_type() == q.scalar_type() && v.size(dims - 3) == total_k &&
                          v.size(dims - 2) == groups && v.size(dims - 1) <= 256 && (packed || v.size(0) == q.size(0)),
                      "v must go with k");
      v_width = v.size(dims - 1);
    }
    sequences = packed ? 0 : q.size(0);
    if (packed) {
      cu_q = checked_contiguous(*cu_seqlens_q, ScalarType::Int, "cu_seqlens_q");
      cu_k = checked_contiguous(*cu_seqlens_k, ScalarType::Int, "cu_seqlens_k");
      STD_TORCH_CHECK(cu_q.dim() == 1 && cu_k.dim() == 1 && cu_q.size(0) == cu_k.size(0) && cu_q.size(0) > 0,
                      "cu_seqlens_q and cu_seqlens_k must be [sequences + 1]");
      sequences = cu_q.size(0) - 1;
      check_ascending(cu_q, total_q, "cu_seqlens_q");
      check_ascending(cu_k, total_k, "cu_seqlens_k");
    }
    if (has_bias) {
      bias = checked_contiguous(*key_bias, ScalarType::Float, "key_bias");
      per_head_bias = bias.dim() == dims - 1;
      const int64_t wanted = (packed ? 1 : sequences) * (per_head_bias ? heads : 1) * total_k;
      STD_TORCH_CHECK(bias.numel() == wanted && (per_head_bias || bias.dim() == dims - 2),
                      "key_bias has the wrong shape");
    }
  }

  // The same queries and keys, for what has no values to add up.
  AttentionCall without_values() const {
    AttentionCall call = *this;
    call.has_values = false;
    return call;
  }

  int64_t batch() const { return packed ? 1 : sequences; }
  int64_t q_begin(int64_t b) const { return packed ? const_data<int32_t>(cu_q)[b] : 0; }
  int64_t k_begin(int64_t b) const { return packed ? const_data<int32_t>(cu_k)[b] : 0; }
  int64_t n_q(int64_t b) const { return packed ? const_data<int32_t>(cu_q)[b + 1] - q_begin(b) : total_q; }
  int64_t n_k(int64_t b) const { return packed ? const_data<int32_t>(cu_k)[b + 1] - k_begin(b) : total_k; }
  // Where the results of one head of one sequence begin: rows of [B,S,H,*], and of [B,H,S].
  int64_t row_at(int64_t b, int64_t h) const { return ((packed ? 0 : b * total_q) + q_begin(b)) * heads + h; }
  int64_t lse_at(int64_t b, int64_t h) const { return (packed ? h : b * heads + h) * total_q + q_begin(b); }
  // Of [B,G or H,T].
  int64_t key_at(int64_t b, int64_t head, int64_t n_heads) const {
    return (packed ? head : b * n_heads + head) * total_k + k_begin(b);
  }

  AttentionHead head(int64_t b, int64_t h) const {
    const int64_t g = h / (heads / groups);
    const float* of_head = nullptr;
    if (has_bias) of_head = const_data<float>(bias) + key_at(b, per_head_bias ? h : 0, per_head_bias ? heads : 1);
    return {dtype,
            rows_of(q, b, q_begin(b), n_q(b), h),
            rows_of(k, b, k_begin(b), n_k(b), g),
            has_values ? rows_of(v, b, k_begin(b), n_k(b), g) : HeadRows{nullptr, 0, 0, 0, 0},
            scale,
            softcap,
            left,
            right,
            of_head};
  }

  // bf16 products where the machine has them.
  const AttentionEngine& engine() const {
    const AttentionKernels& kernels = pick_attention_kernels();
    return dtype == Dtype::bf16 && kernels.bf16 ? *kernels.bf16 : kernels.fp32;
  }

  // Of one head, `count` tokens of x from `begin` on.
  HeadRows rows_of(const Tensor& x, int64_t b, int64_t begin, int64_t count, int64_t head) const {
    const int64_t at = (packed ? 0 : b * x.stride(0)) + begin * x.stride(x.dim() - 3) + head * x.stride(x.dim() - 2);
    const char* base = static_cast<const char*>(x.const_data_ptr()) + at * int64_t(element_size(dtype));
    return {base, x.stride(x.dim() - 3), count, x.size(x.dim() - 1), int64_t(element_size(dtype))};
  }

 private:
  static void check_ascending(const Tensor& cu, int64_t most, const char* name) {
    const int32_t* p = const_data<int32_t>(cu);
    for (int64_t i = 0; i < cu.size(0); ++i)
      STD_TORCH_CHECK(p[i] >= (i > 0 ? p[i - 1] : 0) && p[i] <= most, name, " must ascend within [0, ", most, "]");
  }
};

// Memory that kernels work in, aligned to cache lines.
class AlignedMemory {
 public:
  explicit AlignedMemory(size_t bytes) : p_(std::aligned_alloc(64, (bytes + 127) / 64 * 64)) {
    STD_TORCH_CHECK(p_ != nullptr, "out of memory: ", bytes, " bytes of scratch");
  }
  AlignedMemory(const AlignedMemory&) = delete;
  AlignedMemory& operator=(const AlignedMemory&) = delete;
  ~AlignedMemory() { std::free(p_); }
  void* get() const { return p_; }

 private:
  void* p_;
};

// A thread's packed keys and values, kept as long as its tasks ask for the same ones.
class PackedHead {
 public:
  PackedHead(const AttentionCall& call, const AttentionEngine& engine) : call_(call), engine_(engine) {}

  void pack(int64_t b, int64_t g, const AttentionHead& head, int64_t begin, int64_t end) {
    if (b == b_ && g == g_ && begin == begin_ && end == end_) return;
    b_ = b, g_ = g, begin_ = begin, end_ = end;
    const size_t key_bytes = (engine_.key_bytes(end - begin, head.k.width) + 63) / 64 * 64;
    const size_t bytes = key_bytes + (call_.has_values ? engine_.value_bytes(end - begin, head.v.width) : 0);
    if (bytes > capacity_) memory_ = std::make_unique<AlignedMemory>(capacity_ = bytes);
    keys = memory_ ? memory_->get() : nullptr;
    values = nullptr;
    engine_.pack_keys(head.k, call_.dtype, begin, end, keys);
    if (!call_.has_values) return;
    values = static_cast<char*>(keys) + key_bytes;
    engine_.pack_values(head.v, call_.dtype, begin, end, values);
  }

  void *keys = nullptr, *values = nullptr;

 private:
  const AttentionCall& call_;
  const AttentionEngine& engine_;
  std::unique_ptr<AlignedMemory> memory_;
  size_t capacity_ = 0;
  int64_t b_ = -1, g_ = -1, begin_ = 0, end_ = 0;
};

}  // namespace fastok
