// Attention's gradient on the CPU: what the binding (backward_cpu.cpp) and the SIMD core (backward_simd.cpp) share.
// Torch-free.
#pragma once
#include "attention/attention.h"

namespace fastok {

// What is known of one query head's results.
struct AttentionResults {
  HeadRows out, d_out;
  const float *lse, *d_lse;  // [S]; d_lse may be null
};

// Which part of one query head's matrix, and where its gradients go. Parts begin at multiples of the engine's blocks,
// so that a sum's order does not depend on how a head is divided.
struct BackwardPart {
  int64_t row_begin, row_end, key_begin, key_end;
  void* d_q;  // rows from row_begin on, in the head's dtype; null: not asked for
  int64_t d_q_stride;
  float *d_k, *d_v;  // [key - key_begin][padded width], added to; null: not asked for
  float* d_bias;     // [T], added to with d_k; may be null
};

struct BackwardEngine {
  int64_t row_block, key_block;
  size_t (*sum_bytes)(int64_t n_keys, int64_t width);  // of d_k and d_v
  size_t (*scratch_bytes)(int64_t n_rows, int64_t width, int64_t v_width);
  void (*run)(const AttentionHead&, const AttentionResults&, const BackwardPart&, void* scratch);
  // The sums times a factor, as rows in the head's dtype.
  void (*write_sums)(const float* sums, int64_t n_keys, int64_t width, float factor, Dtype, void* out,
                     int64_t out_stride);
};

struct BackwardKernels {
  BackwardEngine fp32;
  const BackwardEngine* bf16;  // for bf16 input; nullptr without tile instructions
};

FASTOK_DECLARE_KERNELS(BackwardKernels, backward_kernels)

}  // namespace fastok
