// Attention on the CPU: what the bindings (attention_cpu.cpp, scores_cpu.cpp) and the SIMD cores (attention_simd.cpp)
// share. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace fastok {

// For members that SIMD files use too: no copy of them may remain that another instruction set could pick up.
#define FASTOK_INLINE inline __attribute__((always_inline))

// One head's tokens; the last dimension is contiguous.
struct HeadRows {
  const void* data;
  int64_t stride;  // elements from one token to the next
  int64_t count, width, element_bytes;
};

// One query head of one sequence, its keys, and who sees whom: query i sees keys i + T - S - left to i + T - S + right,
// where a negative left or right is unbounded.
struct AttentionHead {
  Dtype dtype;
  HeadRows q, k, v;  // v.data is null where only scores are asked for
  float scale, softcap;
  int64_t left, right;
  const float* bias;  // [T], nullptr: none

  FASTOK_INLINE int64_t first_key(int64_t row) const {
    const int64_t first = row + k.count - q.count - left;
    return left < 0 || first < 0 ? 0 : first < k.count ? first : k.count;
  }
  FASTOK_INLINE int64_t last_key(int64_t row) const {  // one behind
    const int64_t last = row + k.count - q.count + right + 1;
    return right < 0 || last > k.count ? k.count : last > 0 ? last : 0;
  }
};

// Query rows of one head: first, first + 1, ... or those listed.
struct RowList {
  const int64_t* index;
  int64_t first, count;

  FASTOK_INLINE int64_t at(int64_t i) const { return index ? index[i] : first + i; }
  // Up to `most` rows from the `begin`-th on.
  FASTOK_INLINE RowList part(int64_t begin, int64_t most) const {
    return {index ? index + begin : nullptr, first + begin, count - begin < most ? count - begin : most};
  }
};

// Rows [begin, end) of one head that a later task will read.
struct RowsAhead {
  HeadRows rows;
  int64_t begin, end;
};

// What a thread's next tasks will read, of queries, keys and values: asked for while the task before computes.
struct Upcoming {
  static constexpr int kParts = 3;
  RowsAhead part[kParts];
};

// One way of doing it: fp32 vectors, or bf16 products on vectors or tiles where the machine has them. Keys and values
// are packed once per head and thread.
struct AttentionEngine {
  int64_t row_block;  // rows that share a pass over the keys
  int64_t key_step;   // packed keys start at multiples of this
  size_t (*key_bytes)(int64_t n_keys, int64_t width);
  size_t (*value_bytes)(int64_t n_keys, int64_t width);
  size_t (*scratch_bytes)(int64_t width, int64_t v_width);
  // Keys [begin, end), the first ones to out.
  void (*pack_keys)(const HeadRows& k, Dtype, int64_t begin, int64_t end, void* out);
  void (*pack_values)(const HeadRows& v, Dtype, int64_t begin, int64_t end, void* out);
  // out[row] and lse[row] of rows [begin, end) over the packed keys [key_begin, key_end). `out` is fp32 if `wide`, else
  // has the head's dtype. Without values (of width 0) only lse is written.
  void (*forward)(const AttentionHead&, const void* keys, const void* values, int64_t key_begin, int64_t key_end,
                  const RowList&, const Upcoming&, void* out, int64_t out_stride, bool wide, float* lse, void* scratch);
  // Scores of up to row_block listed rows against the packed keys [key_begin, key_end): probabilities by the rows' lse,
  // or logits without one; 0 or -inf where a key is not seen. out[row][key - key_begin], rows `pitch` apart, up to the
  // next multiple of key_step.
  void (*scores)(const AttentionHead&, const void* keys, int64_t key_begin, int64_t key_end, const RowList&,
                 const float* lse, float* out, int64_t pitch, void* scratch);
  // total[key - key_begin] += the sum of these probabilities over the rows, in ascending order. What is added behind
  // the last key, up to the next multiple of key_step, means nothing.
  void (*sum_scores)(const AttentionHead&, const void* keys, int64_t key_begin, int64_t key_end, const RowList&,
                     const float* lse, float* total, void* scratch);
};

struct AttentionKernels {
  // The engines' `scores`, where there are few rows at all: from keys that are not packed.
  void (*few_scores)(const AttentionHead&, int64_t key_begin, int64_t key_end, const RowList&, const float* lse,
                     float* out, int64_t pitch);
  // Attention of few rows: all rows of query heads that share a KV head, up to `decode_rows` together, over the keys
  // [key_begin, key_end), which are read once, where they lie. out[head][row][v width] and lse[head][row] are fp32.
  void (*decode)(const AttentionHead* heads, int64_t n_heads, int64_t key_begin, int64_t key_end, float* out,
                 float* lse, void* scratch);
  int64_t decode_rows;
  size_t decode_scratch_bytes;
  AttentionEngine fp32;
  const AttentionEngine* bf16;  // for bf16 input; nullptr without bf16 instructions
  // Adds (or takes the maximum of) a block's rows to total[key], in ascending order. Whole vectors: blocks and totals
  // are padded to key_step. Sums leave -inf out.
  void (*fold_rows)(const float* block, int64_t rows, int64_t pitch, int64_t keys, bool max, float* total);
  // The same, element by element, into another block; the first one overwrites. `weight`, by key, may be null.
  void (*fold_blocks)(const float* block, int64_t rows, int64_t pitch, int64_t keys, const float* weight, bool first,
                      bool max, float* total);
  // One row from its results over disjoint sets of keys: `part` and `part_lse` of each lie so many floats apart.
  void (*merge_parts)(const float* part, int64_t part_stride, const float* part_lse, int64_t lse_stride, int64_t parts,
                      int64_t width, Dtype, void* out, float* lse);
};

FASTOK_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace fastok
