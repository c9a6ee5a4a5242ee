// What the attention kernels share: where sequences lie, tiles of rows in shared memory, products of tiles, and how
// products become logits. Torch-free.
#pragma once
#include <type_traits>

#include "attention/attention_plan.h"
#include "common/device.cuh"
#include "ptx/cp_async.h"
#include "ptx/cvt.h"
#include "ptx/ex2.h"
#include "ptx/ldmatrix.h"
#include "ptx/mma.h"

namespace fastok::cuda {

constexpr float kUnbounded = __builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// ---- where things lie -----------------------------------------------------------------------------------------------

// A [B, tokens, heads, width] array, or packed [total, heads, width] with batch stride 0; the last dimension is
// contiguous, strides are in elements, and every row begins at a multiple of 16 bytes (rows_aligned).
struct TokenHeads {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;

  template <class T>
  __device__ const T* head(int64_t b, int head) const {
    return static_cast<const T*>(data) + b * batch_stride + head * head_stride;
  }
};

// Whether rows are a whole number of 16 bytes apart, and begin at one.
inline bool rows_aligned(const TokenHeads& heads, size_t element_size) {
  const auto bytes = [&](int64_t stride) { return uint64_t(stride) * element_size; };
  return (reinterpret_cast<uintptr_t>(heads.data) | bytes(heads.batch_stride) | bytes(heads.token_stride) |
          bytes(heads.head_stride)) %
             16 ==
         0;
}

// fp32 numbers by batch entry, head and token.
struct HeadNumbers {
  const float* data;  // nullptr: none
  int64_t batch_stride, head_stride, token_stride;

  __device__ const float* head(int64_t b, int head) const { return data + b * batch_stride + head * head_stride; }
};

struct alignas(16) Sequence {
  int batch;             // entry; 0 of packed sequences
  int q_begin, k_begin;  // first token; 0 of batch entries
  int n_q, n_k;
  int tile;  // of the sequence's, for the block to work on; may lie behind its end
};

// Batch entries of one length, or packed sequences. The latter are found without the host knowing any length.
struct Sequences {
  const int32_t *q_offsets, *k_offsets;  // nullptr: batch entries
  int count;
  int n_q, n_k;  // of each batch entry, or of all packed sequences together

  FASTOK_HOST_DEVICE bool packed() const { return q_offsets != nullptr; }

  // Slots that a grid needs for tiles of `tile` items: so many of each batch entry, or of all packed sequences.
  int64_t slots(int64_t items, int64_t tile) const {
    return packed() ? items / tile + count + 1 : count * ceil_div(items, tile);
  }

  // Whose tile a slot is. A batch entry has `items`, a packed sequence `each` per query or key. Packed sequence s has
  // slots from first * each / tile + s on, which are at least as many as it has tiles. What lies behind the last
  // sequence is another one: queries that see nothing, keys that nobody sees.
  __device__ Sequence find(unsigned slot, bool by_keys, int items, int each, int tile) const {
    if (!q_offsets) {
      const unsigned tiles = unsigned((items + tile - 1) / tile);
      return {int(slot / tiles), 0, 0, n_q, n_k, int(slot % tiles)};
    }
    const int32_t* const offsets = by_keys ? k_offsets : q_offsets;
    const int total = by_keys ? n_k : n_q;
    const auto first_slot = [&](int s) { return int64_t(within(offsets[s], total)) * each / tile + s; };
    int low = 0, high = count;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_slot(middle) <= int64_t(slot)) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    Sequence found{};
    found.tile = int(int64_t(slot) - first_slot(low));
    if (low < count || !by_keys) found.q_begin = within(q_offsets[low], n_q);
    if (low < count || by_keys) found.k_begin = within(k_offsets[low], n_k);
    if (low < count || !by_keys) found.n_q = length(q_offsets, low, n_q) - found.q_begin;
    if (low < count || by_keys) found.n_k = length(k_offsets, low, n_k) - found.k_begin;
    return found;
  }

 private:
  // Offsets come from the user: whatever they are, no index leaves the arrays.
  __device__ static int within(int offset, int total) { return offset < 0 ? 0 : offset < total ? offset : total; }
  __device__ int length(const int32_t* offsets, int s, int total) const {
    const int begin = within(offsets[s], total), end = s < count ? within(offsets[s + 1], total) : total;
    return end < begin ? begin : end;
  }
};

// Query rows of a sequence: those at `index`, or [begin, end) with negative bounds counted from the end.
struct RowSelection {
  const int64_t* index;
  int begin, end;  // of a list: 0 and its length

  __device__ int first(int n_q) const { return begin >= 0 ? begin : n_q + begin < 0 ? 0 : n_q + begin; }
  __device__ int count(int n_q) const {
    if (index) return end;
    const int last = end < 0 ? n_q + end : end < n_q ? end : n_q, rows = last - first(n_q);
    return rows < 0 ? 0 : rows;
  }
  __device__ int at(int i, int n_q) const { return index ? int(index[i]) : first(n_q) + i; }
};

// Who sees whom: a query at position p of its keys sees p - left to p + right. Unbounded: kFarAway.
constexpr int kFarAway = 1 << 30;
struct Window {
  int left, right;
  int begin, end;  // keys that count at all

  __device__ int low(int position) const { return max(position - left, begin); }
  __device__ int high(int position, int n_k) const { return min(min(position + right, n_k - 1), end - 1) + 1; }
  __device__ bool everywhere() const { return left == kFarAway && right == kFarAway; }
};
inline Window window_of(int64_t left, int64_t right) {
  return {int(left < 0 || left > kFarAway ? kFarAway : left), int(right < 0 || right > kFarAway ? kFarAway : right), 0,
          kFarAway};
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Sends rows on their way to a tile: row i from row_of(i), zeros where that is nullptr, padded with zeros to `steps`
// steps. Eight neighbouring threads carry one row.
template <class T, class RowOf>
__device__ __forceinline__ void send_rows(unsigned char* tile, int pitch, int rows, int width, int steps,
                                          const T* anything, const RowOf& row_of) {
  constexpr int kElements = 16 / int(sizeof(T));
#pragma unroll 1
  for (int i = int(threadIdx.x) / 8; i < rows; i += kAttentionThreads / 8) {
    const T* const row = row_of(i);
#pragma unroll 1
    for (int chunk = int(threadIdx.x) % 8; chunk < 2 * steps; chunk += 8) {
      const int begin = chunk * kElements;
      const bool valid = row != nullptr && begin < width;
      ptx::cp_async_16(tile + i * pitch + chunk * 16, valid ? row + begin : anything, valid);
    }
  }
}

// Two neighbouring elements of a tile's row, as one word (fp32: two).
template <class T>
__device__ __forceinline__ void put_pair(unsigned char* to, float first, float second) {
  if constexpr (std::is_same_v<T, float>) {
    *reinterpret_cast<Pack<float, 2>*>(to) = {{first, second}};
  } else if constexpr (std::is_same_v<T, f16>) {
    *reinterpret_cast<uint32_t*>(to) = ptx::cvt_rn_f16x2(first, second);
  } else {
    *reinterpret_cast<uint32_t*>(to) = ptx::cvt_rn_bf16x2(first, second);
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, f16>) {
    ptx::mma_m16n8k16_f16(acc, a, b0, b1);
  } else {
    ptx::mma_m16n8k16_bf16(acc, a, b0, b1);
  }
}

// acc[t][n][e] = dot product of row 16 t + lane / 4 + 8 (e / 2) of `a` (where the warp's rows begin) with row
// 8 n + 2 (lane % 4) + e % 2 of `b`: how mma lays its results out. fp32 is computed by plain arithmetic in the same
// layout: the tensor cores' sums are not rounded to nearest.
template <class T, int kTiles, int kColumns>
__device__ __forceinline__ void multiply_rows(const unsigned char* a, const unsigned char* b, int pitch, int steps,
                                              float (&acc)[kTiles][kColumns][4]) {
  const int lane = lane_index();
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int n = 0; n < kColumns; ++n) acc[t][n][0] = acc[t][n][1] = acc[t][n][2] = acc[t][n][3] = 0;

  if constexpr (std::is_same_v<T, float>) {
    const unsigned char* const a_rows = a + lane / 4 * pitch;
    const unsigned char* const b_rows = b + lane % 4 * 2 * pitch;
#pragma unroll 1
    for (int chunk = 0; chunk < 2 * steps; ++chunk) {
      Pack<float, 4> x[2 * kTiles];
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i)
        x[i] = *reinterpret_cast<const Pack<float, 4>*>(a_rows + 8 * i * pitch + chunk * 16);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const auto y = *reinterpret_cast<const Pack<float, 4>*>(b_rows + (8 * n + j) * pitch + chunk * 16);
#pragma unroll
          for (int i = 0; i < 2 * kTiles; ++i) {
            float& sum = acc[i / 2][n][i % 2 * 2 + j];
#pragma unroll
            for (int d = 0; d < 4; ++d) sum += x[i].at[d] * y.at[d];
          }
        }
      }
    }
  } else {
    static_assert(kColumns % 2 == 0);
    const unsigned char* const a_rows = a + lane % 16 * pitch + lane / 16 * 16;
    const unsigned char* const b_rows = b + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 16;
#pragma unroll(kTiles == 1 ? 2 : 1)  // more would only take registers
    for (int step = 0; step < steps; ++step) {
      uint32_t x[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) ptx::ldmatrix_x4(x[t], a_rows + 16 * t * pitch + step * kStepBytes);
#pragma unroll
      for (int pair = 0; pair < kColumns / 2; ++pair) {
        uint32_t y[4];
        ptx::ldmatrix_x4(y, b_rows + 16 * pair * pitch + step * kStepBytes);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma_m16n8k16<T>(acc[t][2 * pair], x[t], y[0], y[1]);
          mma_m16n8k16<T>(acc[t][2 * pair + 1], x[t], y[2], y[3]);
        }
      }
    }
  }
}

// ---- logits ---------------------------------------------------------------------------------------------------------

// From a dot product to a logit, in units of log 2 where a softmax follows: cap * tanh(scale * product), or scale *
// product without a cap; then bias_scale times the bias is added.
struct LogitRule {
  float scale, cap, bias_scale;
};
inline LogitRule logit_rule(double scale, double softcap, bool raw) {
  const double unit = raw ? 1.0 : 1.4426950408889634;
  if (softcap > 0) return {float(scale / softcap), float(softcap * unit), float(unit)};
  return {float(scale * unit), 0.0f, float(unit)};
}

template <int kTiles, int kColumns>
__device__ __forceinline__ void scale_products(const LogitRule& rule, float (&acc)[kTiles][kColumns][4]) {
  if (rule.cap > 0) {
#pragma unroll
    for (int i = 0; i < kTiles * kColumns * 4; ++i) {
      float& x = acc[i / 4 / kColumns][i / 4 % kColumns][i % 4];
      x = rule.cap * tanhf(x * rule.scale);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTiles * kColumns * 4; ++i) acc[i / 4 / kColumns][i / 4 % kColumns][i % 4] *= rule.scale;
  }
}

// 2^x. Probabilities that are rounded to 16 bits or summed up need no more than the hardware gives; fp32's own ones do.
template <class T>
__device__ __forceinline__ float power_of_two(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return exp2f(x);
  } else {
    return ptx::ex2_approx_ftz(x);
  }
}

}  // namespace fastok::cuda
