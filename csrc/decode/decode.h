// Decode attention on the CPU: what the binding (decode_cpu.cpp) and the SIMD cores (decode_simd.cpp) share.
// Torch-free.
#pragma once
#include "attention/attention.h"
#include "cpu/dispatch.h"
#include "quantize/quantize.h"

namespace fastok {

// Keys that are softened at once; a page counts as one block.
inline constexpr int64_t kDecodeBlock = 64;
// Rows of fp32 arrays begin so many floats apart.
FASTOK_INLINE int64_t decode_pitch(int64_t width) { return (width + 15) / 16 * 16; }

// Query rows that attend to the same keys.
struct DecodeRows {
  int64_t count;
  const float* q;            // [count][decode_pitch(width)], as prepared
  const int64_t* last;       // of each row, the newest place that it sees
  const float* const* bias;  // of each row, by place; nullptr: none
  float softcap;
};

// The softmax so far: sums relative to exp(peak), and their normalizer.
struct DecodeState {
  float* sum;  // [rows][decode_pitch(value width)]
  float *peak, *total;
};

// Rows that follow each other lie far apart, in so many stretches of memory, where several are read faster than one.
inline constexpr int64_t kMostStretches = 4;

// Keys and values that lie in memory as they are: rows of the first KV head, in the order of reading, which is
// kDecodeBlock keys, their values, the next keys. kRowsAhead further ones may be fetched.
struct DenseKeys {
  Dtype dtype;
  const void* const* row;
  const int32_t* place;  // of each key
  int64_t count, width, v_width;
  int64_t stretches;  // 1 or kMostStretches
};
inline constexpr int64_t kRowsAhead = kDecodeBlock + kMostStretches;
// Query rows of a KV head, whose keys and values lie so many elements behind the first head's.
struct DenseHead {
  DecodeRows rows;
  DecodeState state;
  int64_t k_at, v_at;
};

// One page, and which of its entries take part: those whose place is in the ascending `listed` (nullptr: all).
struct PackedKeys {
  const KvFormat* fmt;
  KvPage page;
  const uint8_t* data_end;
  int64_t first;  // place of the first entry
  const int32_t* listed;
  int64_t n_listed;
  bool integers;  // queries and probabilities of 16 bits are accurate enough
};

struct DecodeKernels {
  // Bytes of scratch for so many rows of widths up to `width`.
  size_t (*scratch_bytes)(int64_t rows, int64_t width);
  // A query row in fp32, times `factor`, 0 behind the width; for packed keys in the order and the basis of their codes,
  // otherwise in the order in which their products are made.
  void (*prepare)(const void* q, Dtype, int64_t width, float factor, const KvSide*, const KvChannels&, float* out);
  // Of heads that are read side by side; each one's results are what they would be alone.
  void (*dense)(const DenseHead* heads, int64_t n_heads, const DenseKeys&, void* scratch);
  void (*packed)(const DecodeRows&, const PackedKeys&, const DecodeState&, void* scratch);
  // Rows out[row][width] and lse[row] of a state; for packed values back in the order and the basis of the channels.
  void (*finish)(const DecodeState&, int64_t rows, int64_t width, const KvSide*, const KvChannels&, float* out,
                 float* lse);
};

FASTOK_DECLARE_KERNELS(DecodeKernels, decode_kernels)

}  // namespace fastok
