// Attention on CUDA: a block holds a tile of query rows against the keys that it sees, tile by tile, with an online
// softmax; where the keys are split, combine_kernel puts the pieces together in ascending order. Torch-free.
#pragma once
#include "attention/attention_tile.cuh"
#include "ptx/st.h"

namespace fastok::cuda {

struct AttentionParams {
  TokenHeads q, k, v;
  Sequences sequences;
  RowSelection rows;  // all of them, except for the log-sum-exp alone
  Window window;
  LogitRule rule;
  HeadNumbers bias;  // one for all rows of a block
  int heads, group;  // query heads, and those of one KV head
  int width, v_width;

  int pack, splits, steps, pitch;  // by the plan

  void* out;   // [B, S, H, v_width], packed [total, H, v_width]
  float* lse;  // [B, H, selected], packed [H, total]; natural logarithm
  int64_t lse_batch_stride, lse_head_stride;
  // Of each split, if there are several: normalised, logarithm to base 2. [splits, rows of lse, v_width].
  float *split_out, *split_lse;
  int64_t lse_rows;
};

// ---- online softmax -------------------------------------------------------------------------------------------------

// Of a lane's rows, two per tile: the largest logit so far and the lane's part of the sum of powers relative to it.
template <int kTiles>
struct OnlineSoftmax {
  float peak[kTiles][2], sum[kTiles][2];

  __device__ void reset() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) peak[t][0] = peak[t][1] = -kUnbounded, sum[t][0] = sum[t][1] = 0;
  }

  // Turns logits, in multiples of `unit` > 0, into powers relative to the new peaks. `shrink`: what earlier results are
  // to be multiplied by.
  template <class T, int kColumns>
  __device__ __forceinline__ void advance(float (&x)[kTiles][kColumns][4], float (&shrink)[kTiles][2],
                                          float unit = 1.0f) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = peak[t][half];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) top = fmaxf(top, fmaxf(x[t][n][2 * half], x[t][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
        // While nothing has been seen every logit is -inf, and any finite number serves as the peak.
        const float base = top == -kUnbounded ? 0.0f : top * unit;
        shrink[t][half] = power_of_two<T>(fmaf(peak[t][half], unit, -base));
        peak[t][half] = top;
        float added = 0;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& p = x[t][n][2 * half + j];
            p = power_of_two<T>(fmaf(p, unit, -base));
            added += p;
          }
        }
        sum[t][half] = sum[t][half] * shrink[t][half] + added;
      }
    }
  }

  // The sums of the four lanes that share rows.
  __device__ void agree() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        for (int bit = 1; bit < 4; bit *= 2) sum[t][half] += __shfl_xor_sync(kFullWarp, sum[t][half], bit);
    }
  }

  // Logarithm to base 2 of the sum over all keys; an infinite logit outweighs everything.
  __device__ float log_sum(int t, int half, float unit = 1.0f) const {
    if (sum[t][half] == 0) return -kUnbounded;
    return peak[t][half] == kUnbounded ? kUnbounded : fmaf(peak[t][half], unit, log2f(sum[t][half]));
  }
  __device__ float inverse(int t, int half) const { return sum[t][half] == 0 ? 0.0f : 1.0f / sum[t][half]; }
};

// ---- values ---------------------------------------------------------------------------------------------------------

// out[t][n]: where its element e lies in a row of the result. fp32 lanes read four neighbours of a value at once.
template <class T>
__device__ __forceinline__ int value_column(int n, int j) {
  const int quarter = lane_index() % 4;
  return std::is_same_v<T, float> ? n / 2 * 16 + quarter * 4 + n % 2 * 2 + j : n * 8 + quarter * 2 + j;
}

// Adds the powers p, laid out as multiply_rows does, times the tile of values.
template <class T, int kPitch, int kTiles, int kKeys, int kColumns>
__device__ __forceinline__ void add_values(const float (&p)[kTiles][kKeys][4], const unsigned char* values,
                                           float (&out)[kTiles][kColumns][4]) {
  const int lane = lane_index();
  if constexpr (std::is_same_v<T, float>) {
    static_assert(kTiles == 1);
    const unsigned char* const mine = values + lane % 4 * 16;
#pragma unroll
    for (int key = 0; key < kKeys * 8; ++key) {
      // One of the four lanes that share rows has this key's powers.
      const float upper = __shfl_sync(kFullWarp, p[0][key / 8][key % 2], key % 8 / 2, 4);
      const float lower = __shfl_sync(kFullWarp, p[0][key / 8][2 + key % 2], key % 8 / 2, 4);
#pragma unroll
      for (int m = 0; m < kColumns / 2; ++m) {
        const auto v = *reinterpret_cast<const Pack<float, 4>*>(mine + key * kPitch + m * 64);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          out[0][2 * m + i / 2][i % 2] += upper * v.at[i];
          out[0][2 * m + i / 2][2 + i % 2] += lower * v.at[i];
        }
      }
    }
  } else {
    const unsigned char* const mine = values + lane % 16 * kPitch + lane / 16 * 16;
    // Two neighbouring tiles of results are one tile of factors: the lanes hold just what mma wants of it. All at once,
    // as half the registers hold them then.
    uint32_t x[kKeys / 2][kTiles][4];
#pragma unroll
    for (int i = 0; i < kKeys / 2 * kTiles * 4; ++i) {
      const int step = i / 4 / kTiles, t = i / 4 % kTiles;
      const float* const pair = &p[t][2 * step + i % 4 / 2][i % 2 * 2];
      x[step][t][i % 4] =
          std::is_same_v<T, f16> ? ptx::cvt_rn_f16x2(pair[0], pair[1]) : ptx::cvt_rn_bf16x2(pair[0], pair[1]);
    }
#pragma unroll
    for (int step = 0; step < kKeys / 2; ++step) {
#pragma unroll
      for (int pair = 0; pair < kColumns / 2; ++pair) {
        uint32_t y[4];
        ptx::ldmatrix_x4_trans(y, mine + step * 16 * kPitch + pair * 32);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma_m16n8k16<T>(out[t][2 * pair], x[step][t], y[0], y[1]);
          mma_m16n8k16<T>(out[t][2 * pair + 1], x[step][t], y[2], y[3]);
        }
      }
    }
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// A block's rows: query i of head h is row i * pack + h - first head.
struct BlockRows {
  Sequence sequence;
  int first, count;  // in the sequence: of the block's tile, and of all
  int pack, head;    // the first one

  __device__ int item(int row) const { return (first + row) / pack; }
  __device__ int head_of(int row) const { return head + (first + row) % pack; }
  __device__ bool inside(int row) const { return first + row < count; }
  __device__ int query(int row, const RowSelection& selection) const {
    const int i = item(row);
    return selection.index ? i < selection.end ? int(selection.index[i]) : 0 : selection.at(i, sequence.n_q);
  }
  __device__ int position(int row, const RowSelection& selection) const {
    return query(row, selection) + sequence.n_k - sequence.n_q;
  }
  __device__ int64_t lse_index(const AttentionParams& p, int row) const {
    return sequence.batch * p.lse_batch_stride + head_of(row) * p.lse_head_stride + sequence.q_begin + item(row);
  }
};

// Where the first and the last of rows [begin, end) stand; the others are between. They may be in any order if listed.
struct Positions {
  int from, to;
};
__device__ inline Positions positions_of(const BlockRows& rows, const RowSelection& selection, int begin, int end) {
  const int last = min(end, rows.count - rows.first) - 1, n_k = rows.sequence.n_k;
  if (last < begin) return {0, -kFarAway - 1};  // sees nothing whatever the window
  if (selection.index) return {n_k - rows.sequence.n_q, n_k - 1};
  return {rows.position(begin, selection), rows.position(last, selection)};
}

static_assert(sizeof(BlockRows) <= kBlockRowsBytes);

constexpr int attention_blocks(int tiles, int width) { return tiles == 2 || width > 64 ? 2 : 3; }

// Grid: slots of row tiles, heads / pack, splits. kWidth 0: no values, only the log-sum-exp.
template <class T, int kTiles, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, attention_blocks(kTiles, kWidth))
    attention_kernel(const AttentionParams p) {
  constexpr int kWarpRows = kTiles * 16, kRows = kAttentionWarps * kWarpRows;
  constexpr int kKeys = key_tile(kTiles, kWidth, sizeof(T)), kColumns = kKeys / 8;
  constexpr int kValuePitch = tile_pitch(kWidth, sizeof(T)), kValueColumns = kWidth / 8;
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  auto* const query_tile = memory.take<unsigned char>(kRows * p.pitch, "query_tile");
  auto* const key_tile = memory.take<unsigned char>(kKeys * p.pitch, "key_tile");
  auto* const bias_tile = memory.take<float>(kKeys, "bias_tile");
  auto* const value_tile = kWidth > 0 ? memory.take<unsigned char>(kKeys * kValuePitch, "value_tile") : nullptr;

  // Which rows, and which keys they see. Under a causal mask the last tile takes longest and goes first.
  const int items = p.rows.count(p.sequences.n_q) * p.pack;
  const Sequence found = p.sequences.find(blockIdx.x, false, items, p.pack, kRows);
  const int row_count = p.rows.count(found.n_q) * p.pack, tiles = (row_count + kRows - 1) / kRows;
  if (found.tile >= tiles) return;
  // What is known of the rows lies in shared memory: two tiles fill the registers.
  auto* const noted = memory.take<BlockRows>(1, "block_rows");
  if (threadIdx.x == 0) *noted = {found, (tiles - 1 - found.tile) * kRows, row_count, p.pack, int(blockIdx.y) * p.pack};
  __syncthreads();
  const BlockRows& rows = *noted;
  const Sequence& sequence = rows.sequence;
  const Positions all = positions_of(rows, p.rows, 0, kRows);
  int first_tile = p.window.low(all.from), end = p.window.high(all.to, sequence.n_k);
  if (p.splits > 1) {
    const int keys = split_keys(sequence.n_k), split = int(blockIdx.z);
    first_tile = int(max(int64_t(first_tile), int64_t(split) * keys));
    if (split + 1 < p.splits) end = int(min(int64_t(end), int64_t(split + 1) * keys));
  }
  first_tile = first_tile / kKeys * kKeys;
  const int warp_row = warp_index() * kWarpRows;
  const Positions mine = positions_of(rows, p.rows, warp_row, warp_row + kWarpRows);

  // How tiles are filled.
  const int64_t b = sequence.batch;
  const auto send_tile = [&](unsigned char* tile, const TokenHeads& heads, int tile_begin, int tile_pitch, int width,
                             int tile_steps) {
    const T* const data = heads.head<T>(b, rows.head / p.group) + sequence.k_begin * heads.token_stride;
    send_rows(tile, tile_pitch, kKeys, width, tile_steps, data, [&](int i) -> const T* {
      return tile_begin + i < sequence.n_k ? data + (tile_begin + i) * heads.token_stride : nullptr;
    });
  };
  const auto send_keys = [&](int begin) { send_tile(key_tile, p.k, begin, p.pitch, p.width, p.steps); };
  const T* const q = p.q.head<T>(b, 0) + sequence.q_begin * p.q.token_stride;
  send_rows(query_tile, p.pitch, kRows, p.width, p.steps, q, [&](int i) -> const T* {
    return rows.inside(i) ? q + rows.query(i, p.rows) * p.q.token_stride + rows.head_of(i) * p.q.head_stride : nullptr;
  });
  send_keys(first_tile);

  OnlineSoftmax<kTiles> softmax;
  softmax.reset();
  float out[kTiles][kValueColumns > 0 ? kValueColumns : 1][4] = {};

  for (int begin = first_tile; begin < end; begin += kKeys) {
    ptx::cp_async_wait_all();
    __syncthreads();  // the keys are here, and nobody needs the last values any more
    if constexpr (kWidth > 0) send_tile(value_tile, p.v, begin, kValuePitch, p.v_width, depth_steps(kWidth, sizeof(T)));
    if (p.bias.data && int(threadIdx.x) < kKeys) {
      const int key = begin + int(threadIdx.x);
      const float* const bias = p.bias.head(b, rows.head) + (sequence.k_begin + key) * p.bias.token_stride;
      bias_tile[threadIdx.x] = key < sequence.n_k ? *bias * p.rule.bias_scale : 0.0f;
    }
    const bool busy = begin < p.window.high(mine.to, sequence.n_k) && begin + kKeys > p.window.low(mine.from);
    float x[kTiles][kColumns][4];
    if (busy) multiply_rows<T>(query_tile + warp_row * p.pitch, key_tile, p.pitch, p.steps, x);
    ptx::cp_async_wait_all();
    __syncthreads();  // the values are here, and nobody needs these keys any more
    if (begin + kKeys < end) send_keys(begin + kKeys);
    if (!busy) continue;

    scale_products(p.rule, x);
    if (p.bias.data) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const auto added = *reinterpret_cast<const Pack<float, 2>*>(bias_tile + 8 * n + lane_index() % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) x[i / 4][n][i % 4] += added.at[i % 2];
      }
    }
    if (begin < p.window.low(mine.to) || begin + kKeys > p.window.high(mine.from, sequence.n_k)) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int position = rows.position(warp_row + 16 * t + 8 * half + lane_index() / 4, p.rows);
          // From the lane's first key, so that columns are compared as the constants that they are.
          const int first = begin + lane_index() % 4 * 2;
          const int low = p.window.low(position) - first, high = p.window.high(position, sequence.n_k) - first;
#pragma unroll
          for (int n = 0; n < kColumns; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const bool seen = 8 * n + j >= low && 8 * n + j < high;
              if (!seen) x[t][n][2 * half + j] = -kUnbounded;
            }
          }
        }
      }
    }
    float shrink[kTiles][2];
    softmax.template advance<T>(x, shrink);
    if constexpr (kWidth > 0) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int n = 0; n < kValueColumns; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) out[t][n][e] *= shrink[t][e / 2];
        }
      }
      add_values<T, kValuePitch>(x, value_tile, out);
    }
  }
  softmax.agree();

  // Results: of a split as they are, else through shared memory, so that whole rows are written.
  ptx::cp_async_wait_all();
  const BlockRows results = rows;  // shared memory is about to be divided anew
  __syncthreads();
  auto* const result_tile =
      kWidth > 0 ? SharedMemory(shared).take<unsigned char>(kRows * kValuePitch, "result_tile") : nullptr;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * t + 8 * half + lane_index() / 4;
      const float log_sum = softmax.log_sum(t, half), inverse = softmax.inverse(t, half);
      const bool split = p.splits > 1, inside = results.inside(row);
      const int64_t index = inside ? results.lse_index(p, row) : 0;
      const int64_t split_row = blockIdx.z * p.lse_rows + index;
      if (inside && lane_index() % 4 == 0) {
        if (split) {
          p.split_lse[split_row] = log_sum;
        } else {
          p.lse[index] = log_sum * kLn2;
        }
      }
      if constexpr (kWidth > 0) {
#pragma unroll
        for (int n = 0; n < kValueColumns; ++n) {
          const float first = out[t][n][2 * half] * inverse, second = out[t][n][2 * half + 1] * inverse;
          const int column = value_column<T>(n, 0);
          if (!split) {
            put_pair<T>(result_tile + row * kValuePitch + column * int(sizeof(T)), first, second);
          } else if (inside && column < p.v_width) {
            *reinterpret_cast<Pack<float, 2>*>(p.split_out + split_row * p.v_width + column) = {{first, second}};
          }
        }
      }
    }
  }
  if constexpr (kWidth > 0) {
    if (p.splits > 1) return;
    __syncwarp();
    constexpr int kElements = 16 / int(sizeof(T));
    for (int i = lane_index() / 8; i < kWarpRows && results.inside(warp_row + i); i += 4) {
      const int row = warp_row + i;
      const int64_t token =
          (b * results.sequence.n_q + results.sequence.q_begin + results.query(row, p.rows)) * p.heads +
          results.head_of(row);
      for (int column = lane_index() % 8 * kElements; column < p.v_width; column += 8 * kElements) {
        uint32_t words[4];
        memcpy(words, result_tile + row * kValuePitch + column * int(sizeof(T)), sizeof words);
        ptx::st_global_16(static_cast<T*>(p.out) + token * p.v_width + column, words);
      }
    }
  }
}

// ---- split keys -----------------------------------------------------------------------------------------------------

// One warp per row of the log-sum-exp: the mean of the splits' results, weighted by their sums, in ascending order.
// Splits that a sequence does not have weigh nothing.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads) combine_kernel(const AttentionParams p) {
  const int64_t row = int64_t(blockIdx.x) * kAttentionWarps + warp_index();
  if (row >= p.lse_rows) return;
  float peak = -kUnbounded;
  for (int split = 0; split < p.splits; ++split) peak = fmaxf(peak, p.split_lse[split * p.lse_rows + row]);
  const float base = peak == -kUnbounded ? 0.0f : peak;
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += exp2f(p.split_lse[split * p.lse_rows + row] - base);
  if (lane_index() == 0)
    p.lse[row] = sum == 0 ? -kUnbounded : peak == kUnbounded ? kUnbounded : (peak + log2f(sum)) * kLn2;

  // From [B, H, S] to [B, S, H]; packed sequences are one entry.
  const int64_t tokens = p.lse_head_stride, token = row % tokens, head = row / tokens % p.heads;
  const int64_t to = ((row / tokens / p.heads * tokens + token) * p.heads + head) * p.v_width;
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
  for (int column = lane_index() * 2; column < p.v_width; column += 2 * kWarpSize) {
    float first = 0, second = 0;
    for (int split = 0; split < p.splits; ++split) {
      const int64_t from = split * p.lse_rows + row;
      const float weight = exp2f(p.split_lse[from] - base);
      const auto values = *reinterpret_cast<const Pack<float, 2>*>(p.split_out + from * p.v_width + column);
      first += weight * values.at[0], second += weight * values.at[1];
    }
    put_pair<T>(reinterpret_cast<unsigned char*>(static_cast<T*>(p.out) + to + column), first * inverse,
                second * inverse);
  }
}

}  // namespace fastok::cuda
