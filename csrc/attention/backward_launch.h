// Which kernels of attention's gradient run, with what. `launch` starts kernels: launch(grid, block, shared bytes,
// kernel, arguments...); the CUDA binding and the host harness each bring their own.
#pragma once
#include "attention/backward_kernel.cuh"
#include "attention/scores_kernel.cuh"

namespace fastok::cuda {

using BackwardKernel = void (*)(BackwardParams);

// Those of a head dim; `values` is nullptr where one kernel serves keys and values.
struct BackwardKernels {
  BackwardKernel note_rows, queries, keys, values;
};

template <class T, int kWidth>
BackwardKernels backward_kernels_of() {
  constexpr bool kTogether = kWidth <= 128;
  constexpr GradientOf kKeys = kTogether ? GradientOf::keys_and_values : GradientOf::keys;
  BackwardKernels kernels{note_rows_kernel<T>, gradient_kernel<T, kWidth, GradientOf::queries>,
                          gradient_kernel<T, kWidth, kKeys>, nullptr};
  if constexpr (!kTogether) kernels.values = gradient_kernel<T, kWidth, GradientOf::values>;
  return kernels;
}

// Each element type's kernels are compiled on their own (backward_<type>.cu).
template <class T>
BackwardKernels backward_kernels_of(int width) {
  switch (width) {
    case 64:
      return backward_kernels_of<T, 64>();
    case 128:
      return backward_kernels_of<T, 128>();
    default:
      return backward_kernels_of<T, 256>();
  }
}

#if !defined(FASTOK_HOST)
extern template BackwardKernels backward_kernels_of<f16>(int);
extern template BackwardKernels backward_kernels_of<bf16>(int);
extern template BackwardKernels backward_kernels_of<float>(int);
#endif

// fp32 numbers that run_backward needs to work in: what is known of the rows, and a shared bias's sums by KV head.
inline int64_t bias_pieces(const BackwardParams& p) {
  const int64_t kv_heads = p.heads / p.group, batch = p.sequences.packed() ? 1 : p.sequences.count;
  return p.d_bias && !p.bias_by_head && kv_heads > 1 ? batch * kv_heads * p.sequences.n_k : 0;
}
inline int64_t backward_workspace(const BackwardParams& p) { return 2 * p.rows + bias_pieces(p); }

// p holds the problem and the results.
template <class Launch>
void run_backward(Launch&& launch, Dtype dtype, float* workspace, BackwardParams p) {
  const int width = gradient_width(p.width > p.v_width ? p.width : p.v_width);
  const size_t element = element_size(dtype), bytes = gradient_bytes(width, element);
  const int kept = gradient_kept(width, element), kv_heads = p.heads / p.group;
  const BackwardKernels kernels = dtype == Dtype::f16    ? backward_kernels_of<f16>(width)
                                  : dtype == Dtype::bf16 ? backward_kernels_of<bf16>(width)
                                                         : backward_kernels_of<float>(width);
  p.row_lse = workspace, p.row_delta = workspace + p.rows;
  float* const d_bias = p.d_bias;
  const bool pieces = bias_pieces(p) > 0;
  if (pieces) p.d_bias = workspace + 2 * p.rows;
  const dim3 block(kAttentionThreads);
  if (p.rows > 0) {
    launch(dim3(unsigned(ceil_div(p.rows, kAttentionWarps))), block, size_t(0), kernels.note_rows, p);
    launch(dim3(unsigned(p.sequences.slots(p.sequences.n_q, kept)), unsigned(p.heads)), block, bytes, kernels.queries,
           p);
  }
  const dim3 key_grid(unsigned(p.sequences.slots(p.sequences.n_k, kept)), unsigned(kv_heads));
  if (p.sequences.n_k == 0 || p.sequences.count == 0) return;
  launch(key_grid, block, bytes, kernels.keys, p);
  if (kernels.values) launch(key_grid, block, bytes, kernels.values, p);
  if (!pieces) return;
  const int64_t columns = p.sequences.packed() ? 1 : p.sequences.count;
  launch(dim3(unsigned(ceil_div(columns * p.sequences.n_k, kAttentionThreads))), block, size_t(0),
         reduce_columns_kernel<false>, static_cast<const float*>(p.d_bias), d_bias, columns, kv_heads, p.sequences.n_k);
}

}  // namespace fastok::cuda
