// What the Hopper kernels of attention are started with: the problem as the other kernels have it, and tensor maps.
// Torch-free.
#pragma once
#include "attention/attention_kernel.cuh"
#include "attention/attention_sm90.h"
#include "attention/scores_kernel.cuh"
#include "common/tensor_map.h"

namespace fastok::cuda::sm90 {

// Tokens of all heads, for copies of tiles of 64 elements each. A step of 0: all heads, or batch entries, are the same.
struct TiledHeads {
  TensorMap map;
  int head_step, batch_step;
};

struct ForwardParams {
  AttentionParams p;  // rows: all of them; one head per block, no splits
  TiledHeads q, k, v;
};
struct ScoreSumParams {
  ScoreParams p;  // a range of rows; one head per block, no folds
  TiledHeads q, k;
};

using ForwardKernel = void (*)(ForwardParams);
using ScoreSumKernel = void (*)(ScoreSumParams);

// Each element type and width is compiled on its own (attention_sm90.cu.in).
template <class T, int kWidth>
ForwardKernel forward_kernel_of();
template <class T, int kWidth>
ScoreSumKernel score_sum_kernel_of();

}  // namespace fastok::cuda::sm90
