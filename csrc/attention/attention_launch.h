// Which attention kernels run, with what. `launch` starts kernels: launch(grid, block, shared bytes, kernel,
// arguments...); the CUDA binding and the host harness each bring their own.
#pragma once
#include "attention/attention_kernel.cuh"

namespace fastok::cuda {

using AttentionKernel = void (*)(AttentionParams);

// Each element type's kernels are compiled on their own (attention_<type>.cu).
template <class T>
AttentionKernel attention_kernel_of(int tiles, int width) {
  if constexpr (std::is_same_v<T, float>) {
    switch (width) {
      case 0:
        return attention_kernel<T, 1, 0>;
      case 64:
        return attention_kernel<T, 1, 64>;
      case 128:
        return attention_kernel<T, 1, 128>;
      default:
        return attention_kernel<T, 1, 256>;
    }
  } else {
    switch (width) {
      case 0:
        return attention_kernel<T, 1, 0>;
      case 32:
        return tiles == 2 ? attention_kernel<T, 2, 32> : attention_kernel<T, 1, 32>;
      case 64:
        return tiles == 2 ? attention_kernel<T, 2, 64> : attention_kernel<T, 1, 64>;
      case 96:
        return tiles == 2 ? attention_kernel<T, 2, 96> : attention_kernel<T, 1, 96>;
      case 128:
        return tiles == 2 ? attention_kernel<T, 2, 128> : attention_kernel<T, 1, 128>;
      case 192:
        return attention_kernel<T, 1, 192>;
      default:
        return attention_kernel<T, 1, 256>;
    }
  }
}

// The plan of a forward pass (p.rows: all of each batch entry), or (v_width 0) of the log-sum-exp of the selected rows.
// max_q, max_k: lengths of the longest packed sequences, negative if not known.
inline AttentionPlan plan_for(const AttentionParams& p, Dtype dtype, int64_t max_q, int64_t max_k) {
  const bool packed = p.sequences.packed(), bias_per_head = p.bias.data && p.bias.head_stride != 0;
  const int64_t n_k = p.sequences.n_k;
  return plan_attention(packed ? max_q : p.rows.end - p.rows.begin, packed && max_k >= 0 && max_k < n_k ? max_k : n_k,
                        bias_per_head ? 1 : p.group, p.width, p.v_width, element_size(dtype));
}

// p holds the problem, the results, and split_out and split_lse if the plan has several splits.
template <class Launch>
void run_attention(Launch&& launch, Dtype dtype, const AttentionPlan& plan, AttentionParams p) {
  p.pack = plan.pack, p.splits = plan.splits;
  const int64_t rows = p.sequences.packed() ? p.sequences.n_q : p.rows.end - p.rows.begin;
  const dim3 grid(unsigned(p.sequences.slots(rows * plan.pack, plan.rows())), unsigned(p.heads / plan.pack),
                  unsigned(plan.splits));
  const AttentionKernel kernel = dtype == Dtype::f16    ? attention_kernel_of<f16>(plan.tiles, plan.width)
                                 : dtype == Dtype::bf16 ? attention_kernel_of<bf16>(plan.tiles, plan.width)
                                                        : attention_kernel_of<float>(plan.tiles, plan.width);
  launch(grid, dim3(kAttentionThreads), plan.bytes, kernel, p);
  if (plan.splits == 1) return;
  const auto combine = dtype == Dtype::f16    ? combine_kernel<f16>
                       : dtype == Dtype::bf16 ? combine_kernel<bf16>
                                              : combine_kernel<float>;
  launch(dim3(unsigned(ceil_div(p.lse_rows, kAttentionWarps))), dim3(kAttentionThreads), size_t(0), combine, p);
}

}  // namespace fastok::cuda
