// How the Hopper kernels of attention are started. `launch` also makes tensor maps: launch.tensor_map(TiledArray).
#pragma once
#include "attention/attention_sm90_params.h"

namespace fastok::cuda::sm90 {

// Tiles of `rows` tokens.
template <class Launch>
TiledHeads tiled_heads(Launch& launch, Dtype dtype, const TokenHeads& x, const Sequences& sequences, int tokens,
                       int heads, int width, int rows) {
  const int batch = sequences.packed() ? 1 : sequences.count;
  TiledHeads tiled{};
  tiled.head_step = heads > 1 && x.head_stride == 0 ? 0 : 1;
  tiled.batch_step = batch > 1 && x.batch_stride == 0 ? 0 : 1;
  // Of a dimension of one the stride is never used, but must be one.
  const auto bytes = [&](int64_t stride) { return uint64_t(stride > 0 ? stride : width) * element_size(dtype); };
  tiled.map = launch.tensor_map({x.data,
                                 dtype,
                                 {uint64_t(width), uint64_t(tokens), uint64_t(tiled.head_step ? heads : 1),
                                  uint64_t(tiled.batch_step ? batch : 1)},
                                 {bytes(x.token_stride), bytes(x.head_stride), bytes(x.batch_stride)},
                                 {64, uint32_t(rows), 1, 1}});
  return tiled;
}

template <class Launch>
void run_forward(Launch&& launch, Dtype dtype, const AttentionParams& p) {
  const int width = instance_width(p.width, p.v_width), rows = groups(width) * kGroupRows, kv_heads = p.heads / p.group;
  const Sequences& all = p.sequences;
  const ForwardParams params{p, tiled_heads(launch, dtype, p.q, all, all.n_q, p.heads, p.width, kGroupRows),
                             tiled_heads(launch, dtype, p.k, all, all.n_k, kv_heads, p.width, kTile),
                             tiled_heads(launch, dtype, p.v, all, all.n_k, kv_heads, p.v_width, kTile)};
  const ForwardKernel kernel = dtype == Dtype::f16
                                   ? width == 64 ? forward_kernel_of<f16, 64>() : forward_kernel_of<f16, 128>()
                               : width == 64 ? forward_kernel_of<bf16, 64>()
                                             : forward_kernel_of<bf16, 128>();
  launch(dim3(unsigned(all.slots(all.n_q, rows)), unsigned(p.heads)), dim3(unsigned(threads(groups(width)))),
         forward_bytes(width), kernel, params);
}

// p.out has room for the plan's pieces.
template <class Launch>
void run_score_sums(Launch&& launch, Dtype dtype, const ScorePlan& plan, const ScoreParams& p) {
  const int width = instance_width(p.width, 0);
  const Sequences& all = p.sequences;
  const ScoreSumParams params{p, tiled_heads(launch, dtype, p.q, all, all.n_q, p.heads, p.width, kTile),
                              tiled_heads(launch, dtype, p.k, all, all.n_k, p.heads / p.group, p.width, kTile)};
  const ScoreSumKernel kernel = dtype == Dtype::f16
                                    ? width == 64 ? score_sum_kernel_of<f16, 64>() : score_sum_kernel_of<f16, 128>()
                                : width == 64 ? score_sum_kernel_of<bf16, 64>()
                                              : score_sum_kernel_of<bf16, 128>();
  launch(dim3(unsigned(all.slots(p.n_cols, kTile)), unsigned(p.heads), unsigned(plan.parts)),
         dim3(unsigned(threads(kScoreGroups))), scores_bytes(width), kernel, params);
}

}  // namespace fastok::cuda::sm90
