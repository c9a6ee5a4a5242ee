// Label scores on the CPU: what the binding (label_scores_cpu.cpp) and the SIMD core (label_scores_simd.cpp) share.
// Torch-free.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"
#include "sparse/label_code.h"

namespace fastok {

struct LabelScoresCall {
  // Queries [B, S, H, D] with a contiguous last dimension; strides in elements.
  const void* q;
  Dtype q_dtype;
  int64_t q_batch_stride, q_row_stride, q_head_stride;
  int64_t rows, heads;
  const int64_t* channels;  // [lists, r], of which each serves heads / lists query heads
  int64_t lists, r;
  // Codes [B, labels, r, T]; int4 has the channels c and c + (r + 1) / 2 in row c. Tokens are contiguous.
  const void* data;
  LabelCode code;
  int64_t batch_stride, head_stride, channel_stride;
  int64_t labels;
  const f16* scale;  // [B, labels, T], null without
  int64_t scale_batch_stride, scale_head_stride;
  const int64_t* lengths;  // [B], null: all tokens are there
  int64_t out_heads, tokens;
};

struct LabelScoresKernels {
  // The chosen channels of all queries of sample b, [H, S, r] in fp32.
  void (*gather)(const LabelScoresCall&, int64_t b, float* picked);
  // Tokens [begin, end) of one head of the result, from the sample's `picked`, to their places in out[T].
  void (*score)(const LabelScoresCall&, int64_t b, int64_t out_head, const float* picked, int64_t begin, int64_t end,
                float* out);
};

FASTOK_DECLARE_KERNELS(LabelScoresKernels, label_scores_kernels)

}  // namespace fastok
