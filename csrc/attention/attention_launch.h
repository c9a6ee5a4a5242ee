// Which attention kernels run, with what. `launch` starts kernels: launch(grid, block, shared bytes, kernel,
// arguments...); the CUDA binding and the host harness each bring their own.
#pragma once
#include "attention/attention_kernel.cuh"
#include "attention/attention_sm90_launch.h"
#include "attention/scores_kernel.cuh"

namespace fastok::cuda {

using AttentionKernel = void (*)(AttentionParams);
using ScoresKernel = void (*)(ScoreParams);

// Each element type's kernels are compiled on their own (attention_<type>.cu).
template <class T>
AttentionKernel attention_kernel_of([[maybe_unused]] int tiles, int width) {
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

template <class T>
ScoresKernel scores_kernel_of(int row_tile) {
  return row_tile == kFewScoreRows ? scores_kernel<T, kFewScoreRows> : scores_kernel<T, score_row_tile(sizeof(T))>;
}

#if !defined(FASTOK_HOST)
#define FASTOK_ELSEWHERE(T)                                         \
  extern template AttentionKernel attention_kernel_of<T>(int, int); \
  extern template ScoresKernel scores_kernel_of<T>(int);
FASTOK_ELSEWHERE(f16)
FASTOK_ELSEWHERE(bf16)
FASTOK_ELSEWHERE(float)
#undef FASTOK_ELSEWHERE
#endif

// Hopper's kernels are there only where they were compiled.
#if defined(FASTOK_SM90)
constexpr bool kHasSm90 = true;
#else
constexpr bool kHasSm90 = false;
#endif

// The plan of a forward pass (p.rows: all of each batch entry), or (v_width 0) of the log-sum-exp of the selected rows.
// max_q, max_k: lengths of the longest packed sequences, negative if not known. `capability`: of the device.
inline AttentionPlan plan_for(const AttentionParams& p, Dtype dtype, int64_t max_q, int64_t max_k, int capability) {
  const bool packed = p.sequences.packed(), bias_per_head = p.bias.data && p.bias.head_stride != 0;
  const int64_t n_q = packed ? max_q : p.rows.end - p.rows.begin, n_k = p.sequences.n_k;
  AttentionPlan plan = plan_attention(n_q, packed && max_k >= 0 && max_k < n_k ? max_k : n_k,
                                      bias_per_head ? 1 : p.group, p.width, p.v_width, element_size(dtype));
  plan.sm90 =
      kHasSm90 && p.v_width > 0 &&
      sm90::serves_forward({capability, n_q, n_k, p.width, p.v_width, element_size(dtype), p.rule.scale, p.rule.cap});
  return plan;
}

// p holds the problem, the results, and split_out and split_lse if the plan has several splits.
template <class Launch>
void run_attention(Launch&& launch, Dtype dtype, const AttentionPlan& plan, AttentionParams p) {
  if constexpr (kHasSm90) {
    if (plan.sm90) return sm90::run_forward(launch, dtype, p);
  }
  p.pack = plan.pack, p.splits = plan.splits;
  p.steps = depth_steps(p.width, element_size(dtype)), p.pitch = tile_pitch(p.width, element_size(dtype));
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

// ---- scores ---------------------------------------------------------------------------------------------------------

// The pass that finds the log-sum-exp of the rows that `p` selects (packed: of all rows), over its columns only if
// `over_cols`. Its results are still to be filled in.
inline AttentionParams lse_pass(const ScoreParams& p, bool over_cols) {
  AttentionParams pass{};
  pass.q = p.q, pass.k = p.k, pass.sequences = p.sequences, pass.window = p.window, pass.rule = p.rule;
  pass.bias = p.bias, pass.heads = p.heads, pass.group = p.group, pass.width = p.width;
  pass.rows = p.sequences.packed() ? RowSelection{nullptr, 0, kFarAway} : p.rows;
  if (over_cols && !p.sequences.packed()) pass.window.begin = p.col_begin, pass.window.end = p.col_end;
  pass.lse_head_stride = p.sequences.packed() ? p.sequences.n_q : p.rows.end - p.rows.begin;
  pass.lse_batch_stride = pass.lse_head_stride * p.heads;
  pass.lse_rows = p.sequences.packed() ? pass.lse_batch_stride : p.sequences.count * pass.lse_batch_stride;
  return pass;
}
// Reads the log-sum-exp that the pass has found.
inline void use_lse(ScoreParams& p, const AttentionParams& pass) {
  p.lse = {pass.lse, p.sequences.packed() ? 0 : pass.lse_batch_stride, pass.lse_head_stride, 1};
  p.lse_by_item = !p.sequences.packed();
}

inline ScorePlan plan_for(const ScoreParams& p, Dtype dtype, int capability) {
  ScorePlan plan = plan_scores(p.n_rows, p.n_cols, p.heads, p.group, p.head_group, p.reduce, p.head_max, p.width,
                               element_size(dtype), p.sequences.packed());
  // Of packed sequences the most rows that one could have, whatever the others are.
  const int begin = p.rows.begin, end = p.rows.end;
  const int64_t n_rows = !p.sequences.packed() || (begin < 0) == (end < 0) ? int64_t(end) - begin
                         : begin < 0                                       ? -int64_t(begin)
                                                                           : -1;
  plan.sm90 = kHasSm90 && sm90::serves_scores({capability, n_rows, p.sequences.n_k, p.width, 0, element_size(dtype),
                                               p.rule.scale, p.rule.cap},
                                              p.reduce, p.logits, p.rows.index != nullptr, plan.by_row);
  return plan;
}
// fp32 numbers that the pieces of the columns take.
inline int64_t pieces_size(const ScoreParams& p, const ScorePlan& plan) {
  const int64_t batch = p.sequences.packed() ? 1 : p.sequences.count;
  return plan.pieces == 1 ? 0 : batch * (p.heads / p.head_group) * plan.pieces * p.n_cols;
}

// p holds the problem, the log-sum-exp unless there are to be logits, and the result; `pieces` has room for
// pieces_size().
template <class Launch>
void run_scores(Launch&& launch, Dtype dtype, const ScorePlan& plan, float* pieces, ScoreParams p) {
  p.by_row = plan.by_row, p.block_heads = plan.heads, p.fold = plan.fold, p.part_rows = plan.part_rows;
  p.steps = depth_steps(p.width, element_size(dtype)), p.pitch = tile_pitch(p.width, element_size(dtype));
  float* const out = p.out;
  if (plan.pieces > 1) p.out = pieces;
  const int64_t columns = (p.sequences.packed() ? 1 : p.sequences.count) * int64_t(p.heads / p.head_group);
  if (plan.sm90) {
    if constexpr (kHasSm90) sm90::run_score_sums(launch, dtype, plan, p);
  } else {
    const dim3 grid(unsigned(p.sequences.slots(p.n_cols, score_key_tile(element_size(dtype)))),
                    unsigned(p.heads / plan.heads), unsigned(plan.parts));
    const ScoresKernel kernel = dtype == Dtype::f16    ? scores_kernel_of<f16>(plan.row_tile)
                                : dtype == Dtype::bf16 ? scores_kernel_of<bf16>(plan.row_tile)
                                                       : scores_kernel_of<float>(plan.row_tile);
    launch(grid, dim3(kAttentionThreads), plan.bytes, kernel, p);
  }
  if (plan.pieces == 1) return;
  const auto reduce = p.reduce == ScoreReduce::max ? reduce_columns_kernel<true> : reduce_columns_kernel<false>;
  launch(dim3(unsigned(ceil_div(columns * p.n_cols, kAttentionThreads))), dim3(kAttentionThreads), size_t(0), reduce,
         static_cast<const float*>(pieces), out, columns, plan.pieces, p.n_cols);
}

}  // namespace fastok::cuda
