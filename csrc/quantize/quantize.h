// Packing and unpacking pages on the CPU: what the binding (quantize_cpu.cpp) and the SIMD cores (quantize_simd.cpp)
// share. Torch-free.
#pragma once
#include "common/dtype.h"
#include "cpu/dispatch.h"
#include "quantize/kv_format.h"

namespace fastok {

// What a side's codes need besides its rows. Of one head.
struct KvChannels {
  const f16* factor;     // [D], channel_scale only
  const int32_t* order;  // [D], mixed codes only: the channel that each place of a coded row is taken from
  const float* basis;    // [n,n], where a spectrum is taken
};

// Rows of one page of one head; the last dimension is contiguous.
struct KvRows {
  const void* data;
  int64_t stride;  // elements from one token to the next
  // As many rows that are worth fetching meanwhile.
  const void* ahead;
  int64_t ahead_stride;
};

struct QuantizeKernels {
  size_t (*scratch_bytes)(const KvFormat&);
  // Writes the record of one page.
  void (*seal)(const KvFormat&, Dtype, const KvRows rows[2], const KvChannels channels[2], const float gamma[2],
               const uint8_t* classes, uint8_t* record, void* scratch);
  // The page's entries, dequantized: out[0] keys, out[1] values, rows `stride` elements apart. `data_end`: behind the
  // last byte that may be read.
  void (*unseal)(const KvFormat&, const KvPage&, const uint8_t* data_end, const KvChannels channels[2], Dtype,
                 void* const out[2], int64_t stride, void* scratch);
};

FASTOK_DECLARE_KERNELS(QuantizeKernels, quantize_kernels)

// [n,n]: row i times column j, summed over i, is component j of the half spectrum of n reals: Re F_0 .. Re F_{n/2},
// then Im F_1 .. Im F_{n/2-1}. Kept for the life of the process.
const float* fourier_basis(int64_t n);
// What component j counts in an inner product.
FASTOK_INLINE float fourier_weight(int64_t n, int64_t j) { return (j == 0 || j == n / 2 ? 1.0f : 2.0f) / float(n); }

}  // namespace fastok
