// Merging on the CPU: what the bindings (merge_cpu.cpp, match_cpu.cpp) and the SIMD cores (merge_simd.cpp) share.
// Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace fastok {

enum class MergeMode { mean, sum, max, first };

// A [B, rows, C] array; the last dimension is contiguous, strides are in elements.
struct Tokens {
  void* data;
  int64_t batch_stride, row_stride;
};

struct TokenMapView {
  const int32_t* assign;   // [B, N]
  const int32_t* offsets;  // [B, M + 1]
  const int32_t* members;  // [B, N]
  int64_t n, n_out;
};

// Each function works on rows [begin, end) of the flattened [B * M] (merge, max_backward) or [B * N] (the others).
struct MergeKernels {
  // past_caches: rows of y are whole cache lines, and so many that writing them should not first read them, nor drive
  // other data out of the caches.
  void (*merge)(Dtype, MergeMode, const TokenMapView&, Tokens x, const float* size, Tokens y, float* size_out,
                int64_t channels, bool past_caches, int64_t begin, int64_t end);
  // grad_x of every mode but max.
  void (*backward)(Dtype, MergeMode, const TokenMapView&, Tokens grad_y, const float* size, const float* size_out,
                   Tokens grad_x, int64_t channels, int64_t begin, int64_t end);
  // grad_x of mode max; rows of dropped tokens are left alone.
  void (*max_backward)(Dtype, const TokenMapView&, Tokens grad_y, Tokens x, Tokens y, Tokens grad_x, int64_t channels,
                       int64_t begin, int64_t end);
  // residual.data may be null.
  void (*unmerge)(Dtype, const TokenMapView&, Tokens y, Tokens residual, Tokens out, int64_t channels, int64_t begin,
                  int64_t end);
};

FASTOK_DECLARE_KERNELS(MergeKernels, merge_kernels)

// assign [B, N] -> offsets [B, M + 1], members [B, N] padded with -1. Values must be below n_out; negative is dropped.
void build_csr(const int32_t* assign, int64_t batch, int64_t n, int64_t n_out, int32_t* offsets, int32_t* members);

}  // namespace fastok
