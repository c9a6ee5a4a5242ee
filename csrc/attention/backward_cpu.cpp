// CPU backend of attention's gradient: sharing out the heads. The arithmetic is in backward_simd.cpp.
#include "attention/backward.h"

#include <tuple>
#include <vector>

#include "attention/call_cpu.h"

namespace fastok {
namespace {

// All query heads of one KV head, or (heads_end - heads_begin == 1, keys false) one query head.
struct Task {
  int64_t b, head_begin, head_end;
  int64_t row_begin, row_end, key_begin, key_end;
  bool queries, keys;  // whose gradients
};

int64_t cut(int64_t count, int64_t block, int64_t parts) {
  const int64_t blocks = (count + block - 1) / block;
  return std::max<int64_t>((blocks + parts - 1) / parts, 1) * block;
}

// One pass finds all gradients of a KV head and its query heads, in five products. Where there are too few of these for
// the threads, one pass finds those of the keys and another one those of the queries, in seven products that can be cut
// into parts. Both add up in the same order.
std::vector<Task> tasks_of(const AttentionCall& call, const BackwardEngine& engine, int64_t threads) {
  const int64_t whole = call.sequences * call.groups, group = call.heads / call.groups;
  const int64_t rounds = (whole + threads - 1) / std::max<int64_t>(threads, 1);
  const bool together = 5 * rounds * threads <= 7 * (whole + threads / 2);
  const int64_t parts = whole > 0 ? (2 * threads + whole - 1) / whole : 1;
  std::vector<Task> tasks;
  for (int64_t b = 0; b < call.sequences; ++b) {
    const int64_t n_q = call.n_q(b), n_k = call.n_k(b);
    for (int64_t g = 0; g < call.groups; ++g) {
      const int64_t first = g * group, last = first + group;
      if (together) {
        tasks.push_back({b, first, last, 0, n_q, 0, n_k, true, true});
        continue;
      }
      const int64_t keys = cut(n_k, engine.key_block, parts);
      for (int64_t key = 0; key < n_k; key += keys)
        tasks.push_back({b, first, last, 0, n_q, key, std::min(n_k, key + keys), false, true});
      const int64_t rows = cut(n_q, engine.row_block, (parts + group - 1) / group);
      for (int64_t h = first; h < last; ++h)
        for (int64_t row = 0; row < n_q; row += rows)
          tasks.push_back({b, h, h + 1, row, std::min(n_q, row + rows), 0, n_k, true, false});
    }
  }
  return tasks;
}

void fill_zero(const Tensor& x, int64_t begin, int64_t end) {
  const int64_t bytes = int64_t(element_size(dtype_of(x, "gradient")));
  char* const data = static_cast<char*>(x.mutable_data_ptr());
  std::fill(data + begin * bytes, data + end * bytes, 0);
}

Tensor like(const Tensor& x) { return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q,
                                                              Tensor k, Tensor v, Tensor out, Tensor lse, double scale,
                                                              int64_t left, int64_t right, double softcap,
                                                              std::optional<Tensor> key_bias,
                                                              std::optional<Tensor> cu_seqlens_q,
                                                              std::optional<Tensor> cu_seqlens_k, int64_t, int64_t) {
  const AttentionCall call(q, k, v, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k);
  const Tensor d_out = with_dense_rows(grad_out), outs = with_dense_rows(out);
  for (const Tensor* x : {&d_out, &outs}) {
    STD_TORCH_CHECK(
        x->dim() == call.q.dim() && x->scalar_type() == call.q.scalar_type() && x->size(x->dim() - 1) == call.v_width,
        "out and its gradient must go with q and v");
    for (int64_t axis = 0; axis + 1 < x->dim(); ++axis)
      STD_TORCH_CHECK(x->size(axis) == call.q.size(axis), "out and its gradient must go with q");
  }
  const int64_t batch = call.batch(), n_q = call.total_q, n_k = call.total_k;
  const Tensor lses = checked_contiguous(lse, ScalarType::Float, "lse");
  const Tensor d_lses = grad_lse ? checked_contiguous(*grad_lse, ScalarType::Float, "grad_lse") : Tensor();
  for (const Tensor* x : {&lses, &d_lses})
    STD_TORCH_CHECK((x == &d_lses && !grad_lse) || x->numel() == batch * call.heads * n_q, "lse must be [B,H,S] of q");

  const Tensor d_q = like(call.q), d_k = like(call.k), d_v = like(call.v);
  const Tensor d_bias = call.has_bias ? like(call.bias) : empty_like_device(call.q, {0}, ScalarType::Float);
  // By query head, also where they share a bias.
  const bool shared_bias = call.has_bias && !call.per_head_bias;
  std::vector<float> head_bias(shared_bias ? size_t(batch * call.heads * n_k) : 0);
  float* const bias_sums = !call.has_bias ? nullptr : shared_bias ? head_bias.data() : data<float>(d_bias);
  if (call.has_bias && !shared_bias) fill_zero(d_bias, 0, d_bias.numel());
  if (call.packed) {
    // What lies before the first and behind the last sequence.
    const int64_t q_row = call.heads * call.width, k_row = call.groups * call.width, v_row = call.groups * call.v_width;
    const int64_t last = call.sequences, first_q = call.q_begin(0), first_k = call.k_begin(0);
    fill_zero(d_q, 0, first_q * q_row), fill_zero(d_q, call.q_begin(last) * q_row, n_q * q_row);
    fill_zero(d_k, 0, first_k * k_row), fill_zero(d_k, call.k_begin(last) * k_row, n_k * k_row);
    fill_zero(d_v, 0, first_k * v_row), fill_zero(d_v, call.k_begin(last) * v_row, n_k * v_row);
  }

  const BackwardKernels& kernels = pick_backward_kernels();
  const BackwardEngine& engine = call.dtype == Dtype::bf16 && kernels.bf16 ? *kernels.bf16 : kernels.fp32;
  const std::vector<Task> tasks = tasks_of(call, engine, int64_t(torch::stable::get_num_threads()));
  int64_t most_rows = 0, most_keys = 0;
  for (const Task& t : tasks) {
    most_rows = std::max(most_rows, t.row_end - t.row_begin);
    if (t.keys) most_keys = std::max(most_keys, t.key_end - t.key_begin);
  }
  const size_t d_k_bytes = engine.sum_bytes(most_keys, call.width),
               d_v_bytes = engine.sum_bytes(most_keys, call.v_width);
  const int64_t element = int64_t(element_size(call.dtype)), group = call.heads / call.groups;
  char *const d_qs = static_cast<char*>(d_q.mutable_data_ptr()),
              *const d_ks = static_cast<char*>(d_k.mutable_data_ptr()),
              *const d_vs = static_cast<char*>(d_v.mutable_data_ptr());
  const double mean_cost = double(most_rows) * double(n_k / std::max<int64_t>(call.packed ? call.sequences : 1, 1)) *
                           double(group * (3 * call.width + 2 * call.v_width));
  const int64_t grain = 1 + int64_t(100e3 / (mean_cost + 1));
  torch::stable::parallel_for(0, int64_t(tasks.size()), grain, [&](int64_t begin, int64_t end) {
    const AlignedMemory scratch(engine.scratch_bytes(most_rows, call.width, call.v_width));
    const AlignedMemory sums(d_k_bytes + d_v_bytes);
    float* const k_sums = static_cast<float*>(sums.get());
    float* const v_sums = k_sums + d_k_bytes / sizeof(float);
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = tasks[i];
      const int64_t n_keys = t.key_end - t.key_begin;
      if (t.keys) {
        std::fill(k_sums, k_sums + engine.sum_bytes(n_keys, call.width) / sizeof(float), 0.0f);
        std::fill(v_sums, v_sums + engine.sum_bytes(n_keys, call.v_width) / sizeof(float), 0.0f);
      }
      for (int64_t h = t.head_begin; h < t.head_end; ++h) {
        const AttentionHead head = call.head(t.b, h);
        const int64_t lse_at = call.lse_at(t.b, h);
        const AttentionResults results{call.rows_of(outs, t.b, call.q_begin(t.b), head.q.count, h),
                                       call.rows_of(d_out, t.b, call.q_begin(t.b), head.q.count, h),
                                       const_data<float>(lses) + lse_at,
                                       grad_lse ? const_data<float>(d_lses) + lse_at : nullptr};
        const int64_t row = call.row_at(t.b, h) + t.row_begin * call.heads;
        const BackwardPart part{t.row_begin,
                                t.row_end,
                                t.key_begin,
                                t.key_end,
                                t.queries ? d_qs + row * call.width * element : nullptr,
                                call.heads * call.width,
                                t.keys ? k_sums : nullptr,
                                t.keys ? v_sums : nullptr,
                                bias_sums ? bias_sums + call.key_at(t.b, h, call.heads) : nullptr};
        engine.run(head, results, part, scratch.get());
      }
      if (!t.keys) continue;
      const int64_t key =
          ((call.packed ? 0 : t.b * n_k) + call.k_begin(t.b) + t.key_begin) * call.groups + t.head_begin / group;
      engine.write_sums(k_sums, n_keys, call.width, call.scale, call.dtype, d_ks + key * call.width * element,
                        call.groups * call.width);
      engine.write_sums(v_sums, n_keys, call.v_width, 1.0f, call.dtype, d_vs + key * call.v_width * element,
                        call.groups * call.v_width);
    }
  });

  for (int64_t b = 0; b < batch && shared_bias; ++b) {
    float* const total = data<float>(d_bias) + b * n_k;
    std::fill(total, total + n_k, 0.0f);
    for (int64_t h = 0; h < call.heads; ++h)
      for (int64_t j = 0; j < n_k; ++j) total[j] += head_bias[size_t((b * call.heads + h) * n_k + j)];
  }
  return {d_q, d_k, d_v, d_bias};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("attention_backward", TORCH_BOX(&fastok::attention_backward)); }
