// Which decode kernels run, with what. `launch` starts kernels: launch(grid, block, shared bytes, kernel,
// arguments...); the CUDA binding and the host harness each bring their own.
#pragma once
#include "decode/decode_kernel.cuh"

namespace fastok::cuda {

using DecodeKernel = void (*)(DecodeParams);

template <class T>
DecodeKernel decode_kernel_of(int width) {
  if constexpr (std::is_same_v<T, float>) {
    return width == 64 ? decode_kernel<T, 64> : width == 128 ? decode_kernel<T, 128> : decode_kernel<T, 256>;
  } else {
    switch (width) {
      case 32:
        return decode_kernel<T, 32>;
      case 64:
        return decode_kernel<T, 64>;
      case 96:
        return decode_kernel<T, 96>;
      case 128:
        return decode_kernel<T, 128>;
      case 192:
        return decode_kernel<T, 192>;
      default:
        return decode_kernel<T, 256>;
    }
  }
}

// Words of the set of tokens of one list.
inline int list_words(int64_t total) { return int(ceil_div(total, 32)); }

// `list`: the tokens as they come, with p.tokens and p.token_counts to be written.
template <class Launch>
void run_order_tokens(Launch&& launch, int64_t batch, const ListParams& list) {
  launch(dim3(unsigned(batch * list.lists)), dim3(kOrderThreads), shared_bytes<int>(32), order_tokens_kernel, list);
}

inline DecodePlan plan_for(const DecodeParams& p, Dtype dtype) {
  const bool list_per_head = p.tokens && p.group > 1 && p.lists == p.heads;
  return plan_decode(p.rows, p.group, list_per_head, p.width, p.v_width, p.tokens ? p.list_size : p.total,
                     element_size(dtype));
}

// Puts the splits together, if there are several.
template <class T, class Launch>
void run_combine(Launch& launch, const DecodeParams& p) {
  if (p.splits == 1) return;
  constexpr size_t kBytes = shared_bytes<float>(kMostDecodeSplits) + shared_bytes<float>(4 * kDecodeThreads);
  launch(dim3(unsigned(p.lse_rows)), dim3(kDecodeThreads), kBytes, combine_splits_kernel<T>, p);
}

// p holds the problem, the results, and split_out and split_lse if the plan has several splits.
template <class T, class Launch>
void run_decode_of(Launch& launch, int64_t batch, const DecodePlan& plan, DecodeParams p) {
  p.pack = plan.pack, p.row_tiles = plan.row_tiles, p.splits = plan.splits;
  p.steps = depth_steps(p.width, sizeof(T)), p.pitch = tile_pitch(p.width, sizeof(T));
  const dim3 grid(unsigned(batch * (p.heads / plan.pack) * plan.row_tiles), unsigned(plan.splits));
  launch(grid, dim3(kDecodeThreads), plan.bytes, decode_kernel_of<T>(plan.width), p);
  run_combine<T>(launch, p);
}

template <class Launch>
void run_decode(Launch&& launch, Dtype dtype, int64_t batch, const DecodePlan& plan, const DecodeParams& p) {
  switch (dtype) {
    case Dtype::f16:
      return run_decode_of<f16>(launch, batch, plan, p);
    case Dtype::bf16:
      return run_decode_of<bf16>(launch, batch, plan, p);
    default:
      return run_decode_of<float>(launch, batch, plan, p);
  }
}

}  // namespace fastok::cuda
