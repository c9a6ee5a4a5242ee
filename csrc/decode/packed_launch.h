// Which kernels decode packed caches, with what. `launch` as in decode_launch.h. Torch-free.
#pragma once
#include "decode/decode_launch.h"
#include "decode/packed_kernel.cuh"

namespace fastok::cuda {

using PackedKernel = void (*)(PackedParams);

template <class T>
PackedKernel packed_kernel_of(int width) {
  return width == 64 ? packed_kernel<T, 64> : width == 128 ? packed_kernel<T, 128> : packed_kernel<T, 256>;
}

// Places that a head's tokens can have.
inline int64_t packed_capacity(const PackedView& cache) { return cache.pages * cache.fmt.page + cache.window; }

inline PackedPlan plan_for(const PackedParams& p, Dtype dtype) {
  const DecodeParams& decode = p.decode;
  const bool list_per_head = decode.tokens && decode.group > 1 && decode.lists == decode.heads;
  return plan_packed(p.cache.fmt, decode.rows, decode.group, list_per_head, p.cache.pages, p.cache.window,
                     element_size(dtype));
}

// p holds the problem, the results, and split_out and split_lse if the plan has several splits.
template <class T, class Launch>
void run_packed_of(Launch& launch, int64_t batch, const PackedPlan& plan, PackedParams p) {
  p.decode.pack = plan.pack, p.decode.row_tiles = plan.row_tiles, p.decode.splits = plan.splits;
  p.page_splits = plan.page_splits;
  for (int which = 0; which < 2; ++which) p.code_bytes[which] = plan.code_bytes[which];
  p.cosines = Cosines::make();
  const dim3 grid(unsigned(batch * (p.decode.heads / plan.pack) * plan.row_tiles), unsigned(plan.splits));
  launch(grid, dim3(kDecodeThreads), plan.bytes, packed_kernel_of<T>(plan.width), p);
  run_combine<T>(launch, p.decode);
}

template <class Launch>
void run_packed(Launch&& launch, Dtype dtype, int64_t batch, const PackedPlan& plan, const PackedParams& p) {
  switch (dtype) {
    case Dtype::f16:
      return run_packed_of<f16>(launch, batch, plan, p);
    case Dtype::bf16:
      return run_packed_of<bf16>(launch, batch, plan, p);
    default:
      return run_packed_of<float>(launch, batch, plan, p);
  }
}

}  // namespace fastok::cuda
