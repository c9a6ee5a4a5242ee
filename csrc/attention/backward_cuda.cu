// CUDA backend of attention_backward: checks and launches. Kernels are in backward_kernel.cuh, compiled by element type
// in backward_<type>.cu.
#include <tuple>

#include "attention/backward_launch.h"
#include "attention/call_cuda.h"

namespace fastok::cuda {
namespace {

Tensor like(const Tensor& x) { return torch::stable::empty(x.sizes(), x.scalar_type(), std::nullopt, x.device()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q,
                                                              Tensor k, Tensor v, Tensor out, Tensor lse, double scale,
                                                              int64_t left, int64_t right, double softcap,
                                                              std::optional<Tensor> key_bias,
                                                              std::optional<Tensor> cu_seqlens_q,
                                                              std::optional<Tensor> cu_seqlens_k, int64_t, int64_t) {
  const Problem problem(q, k, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k, false);
  const int64_t v_width = problem.check_values(v), n_q = problem.sequences.n_q, heads = problem.heads;
  const bool packed = problem.packed();
  for (const Tensor* x : {&grad_out, &out}) {
    STD_TORCH_CHECK(x->dim() == q.dim() && x->scalar_type() == q.scalar_type() && size_from_end(*x, 1) == v_width,
                    "out and its gradient must go with q and v");
    for (int64_t axis = 0; axis + 1 < q.dim(); ++axis)
      STD_TORCH_CHECK(x->size(axis) == q.size(axis), "out and its gradient must go with q");
    check_on_device(*x, "out and its gradient", q, "q");
  }
  const std::optional<Tensor> given_lse = lse;
  for (const std::optional<Tensor>* x : {&given_lse, const_cast<const std::optional<Tensor>*>(&grad_lse)}) {
    if (!*x) continue;
    if (packed) {
      check_shape(**x, "lse", {heads, n_q});
    } else {
      check_shape(**x, "lse", {problem.batch(), heads, n_q});
    }
  }

  const Tensor values = aligned_rows(v, problem.dtype), outs = aligned_rows(out, problem.dtype);
  const Tensor d_out = aligned_rows(grad_out, problem.dtype);
  const Tensor d_q = like(q), d_k = like(k), d_v = like(v);
  const Tensor d_bias = key_bias ? like(*key_bias) : floats(q, 0);
  auto p = problem.params<BackwardParams>();
  p.v = heads_of(values), p.out = heads_of(outs), p.d_out = heads_of(d_out), p.v_width = int(v_width);
  p.lse = numbers_of(given_lse, packed, "lse", q), p.d_lse = numbers_of(grad_lse, packed, "grad_lse", q);
  p.scale = float(scale);
  p.row_head_stride = n_q, p.row_batch_stride = n_q * heads, p.rows = problem.batch() * p.row_batch_stride;
  p.d_q = d_q.mutable_data_ptr(), p.d_k = d_k.mutable_data_ptr(), p.d_v = d_v.mutable_data_ptr();
  p.bias_by_head = key_bias && key_bias->dim() == (packed ? 2 : 3);
  if (key_bias) p.d_bias = data<float>(d_bias);

  const Tensor workspace = floats(q, backward_workspace(p));
  run_backward(Launcher(q), problem.dtype, data<float>(workspace), p);
  return {d_q, d_k, d_v, d_bias};
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) {
  m.impl("attention_backward", TORCH_BOX(&fastok::cuda::attention_backward));
}
