// Which label score kernel runs, with what. `launch` starts kernels: launch(grid, block, shared bytes, kernel,
// arguments...); the CUDA binding and the host harness each bring their own.
#pragma once
#include "sparse/label_scores_kernel.cuh"

namespace fastok::cuda {

template <class Code, class Launch>
void run_label_scores_of(Launch& launch, int64_t batch, LabelParams p) {
  const int group = p.heads / p.out_heads, sharing = p.heads / p.labels;
  const int64_t queries = int64_t(group < sharing ? group : sharing) * p.rows;
  const int tile = kLabelThreads * label_tokens(sizeof(Code));
  p.held = queries_held(queries, p.r), p.tiles = (p.tokens + tile - 1) / tile;
  const auto kernel = queries_at_once(queries) == 1 ? label_scores_kernel<Code, 1> : label_scores_kernel<Code, 4>;
  launch(dim3(unsigned(batch * p.out_heads * p.tiles)), dim3(kLabelThreads), label_bytes(p.held, p.r), kernel, p);
}

// p holds the problem and the result, `size` bytes to a code; the plan is filled in.
template <class Launch>
void run_label_scores(Launch&& launch, LabelCode code, int64_t batch, LabelParams p) {
  const auto rows_aligned = [](const void* data, size_t size, std::initializer_list<int64_t> strides) {
    uint64_t all = reinterpret_cast<uintptr_t>(data);
    for (const int64_t stride : strides) all |= uint64_t(stride) * size;
    return all % 16 == 0;
  };
  const size_t size = code == LabelCode::f32 ? 4 : code == LabelCode::f16 || code == LabelCode::bf16 ? 2 : 1;
  p.aligned = rows_aligned(p.data, size, {p.batch_stride, p.head_stride, p.channel_stride});
  p.scale_aligned = rows_aligned(p.scale, sizeof(f16), {p.scale_batch_stride, p.scale_head_stride});
  switch (code) {
    case LabelCode::f32:
      return run_label_scores_of<float>(launch, batch, p);
    case LabelCode::f16:
      return run_label_scores_of<f16>(launch, batch, p);
    case LabelCode::bf16:
      return run_label_scores_of<bf16>(launch, batch, p);
    case LabelCode::int8:
      return run_label_scores_of<int8_t>(launch, batch, p);
    case LabelCode::int4:
      return run_label_scores_of<int4_pair>(launch, batch, p);
  }
}

}  // namespace fastok::cuda
