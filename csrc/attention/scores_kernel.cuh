// Column statistics of the attention matrix on CUDA, in a second pass over the products: a block keeps a tile of keys
// and lets the selected query rows go by, each with its finished log-sum-exp, so that a key's sum or maximum never
// leaves the registers. No atomics; pieces of a column are put together by reduce_columns_kernel. Torch-free.
#pragma once
#include "attention/attention_tile.cuh"

namespace fastok::cuda {

struct ScoreParams {
  TokenHeads q, k;
  Sequences sequences;
  RowSelection rows;
  Window window;
  LogitRule rule;
  HeadNumbers bias, weight;  // by query head; by KV head
  HeadNumbers lse;           // natural logarithm, by query head, and by query or (lse_by_item) selected row
  bool lse_by_item;
  int heads, group, width;
  int col_begin, col_end;  // keys of a batch entry

  bool logits, head_max, by_row;
  ScoreReduce reduce;
  int head_group;
  int block_heads, fold, part_rows, steps, pitch;  // by the plan

  // One column of n_cols keys for each fold of heads and part of the rows; with reduce none one for each selected row.
  float* out;
  int n_cols, n_rows;
};

// fmaxf, but NaN wins, as everywhere in PyTorch.
__device__ __forceinline__ float larger(float a, float b) { return a > b || isnan(a) ? a : b; }

// Logits of keys that are not seen do not count in sums.
__device__ __forceinline__ float counted(float x) { return x == -kUnbounded ? 0.0f : x; }

// What a block knows of the rows in a tile.
struct ScoreRows {
  float* lse;       // to base 2; +inf where nothing is to come out
  int *low, *high;  // the keys that the row sees
};

// Grid: slots of key tiles, heads / block_heads, parts of the rows.
template <class T, int kRows>
__global__ void __launch_bounds__(kAttentionThreads, 2) scores_kernel(const ScoreParams p) {
  constexpr int kTiles = score_key_tile(sizeof(T)) / 16 / kAttentionWarps, kKeys = score_key_tile(sizeof(T));
  constexpr int kColumns = kRows / 8;
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const int pitch = p.pitch;
  auto* const key_tile = memory.take<unsigned char>(kKeys * pitch, "key_tile");
  auto* const row_tiles = memory.take<unsigned char>(2 * kRows * pitch, "row_tiles");
  ScoreRows about{};
  about.lse = memory.take<float>(2 * kRows, "row_lse");
  about.low = memory.take<int>(2 * kRows, "row_low");
  about.high = memory.take<int>(2 * kRows, "row_high");

  // Which keys, and which of the selected rows: those of this part that may see some of them.
  const bool keeps_rows = p.reduce == ScoreReduce::none;
  const int n_block_cols = p.col_end - p.col_begin;
  const Sequence sequence = p.sequences.find(blockIdx.x, true, n_block_cols, 1, kKeys);
  const int first_col = p.sequences.packed() ? 0 : p.col_begin;
  const int last_col = p.sequences.packed() ? sequence.n_k : p.col_end;
  const int key_begin = first_col + sequence.tile * kKeys;
  if (key_begin >= last_col) return;
  const int n_selected = p.rows.count(sequence.n_q), offset = sequence.n_k - sequence.n_q;
  int row_begin = int(blockIdx.z) * p.part_rows, row_end = int(blockIdx.z) + 1 < int(gridDim.z)
                                                               ? row_begin + p.part_rows
                                                               : max(n_selected, keeps_rows ? p.n_rows : 0);
  if (!keeps_rows) {
    row_end = min(row_end, n_selected);
    if (!p.rows.index) {
      const int first = p.rows.first(sequence.n_q), last_key = min(key_begin + kKeys, last_col) - 1;
      row_begin = int(max(int64_t(row_begin), int64_t(key_begin) - p.window.right - offset - first));
      row_end = int(min(int64_t(row_end), int64_t(last_key) + p.window.left - offset - first + 1));
    }
  }
  const int n_tiles = row_end > row_begin ? (row_end - row_begin + kRows - 1) / kRows : 0;
  const int n_steps = n_tiles * p.block_heads;

  // Step s: by row, all heads of a tile of rows; else all tiles of a head.
  const int64_t b = sequence.batch;
  const int first_head = int(blockIdx.y) * p.block_heads;
  const auto head_of = [&](int s) { return first_head + (p.by_row ? s % p.block_heads : s / n_tiles); };
  const auto tile_of = [&](int s) { return p.by_row ? s / p.block_heads : s % n_tiles; };
  const auto send_keys = [&](int head) {
    const T* const data = p.k.head<T>(b, head / p.group) + sequence.k_begin * p.k.token_stride;
    send_rows(key_tile, pitch, kKeys, p.width, p.steps, data, [&](int i) -> const T* {
      return key_begin + i < last_col ? data + (key_begin + i) * p.k.token_stride : nullptr;
    });
  };
  const auto send_queries = [&](int s) {
    const T* const data = p.q.head<T>(b, head_of(s)) + sequence.q_begin * p.q.token_stride;
    const int first = row_begin + tile_of(s) * kRows;
    send_rows(row_tiles + s % 2 * kRows * pitch, pitch, kRows, p.width, p.steps, data, [&](int i) -> const T* {
      if (first + i >= min(row_end, n_selected)) return nullptr;
      const int query = p.rows.at(first + i, sequence.n_q);
      return unsigned(query) < unsigned(sequence.n_q) ? data + query * p.q.token_stride : nullptr;
    });
  };
  // The rest about the rows, a thread for each.
  const auto note_rows = [&](int s) {
    const int i = int(threadIdx.x), item = row_begin + tile_of(s) * kRows + i, to = s % 2 * kRows + i;
    if (i >= kRows) return;
    const int query = item < min(row_end, n_selected) ? p.rows.at(item, sequence.n_q) : -1;
    const bool inside = unsigned(query) < unsigned(sequence.n_q);
    about.low[to] = inside ? p.window.low(query + offset) : 0;
    about.high[to] = inside ? p.window.high(query + offset, sequence.n_k) : 0;
    if (p.logits) return;
    float lse = -kUnbounded;
    if (inside) lse = p.lse.head(b, head_of(s))[(p.lse_by_item ? item : sequence.q_begin + query) * p.lse.token_stride];
    about.lse[to] = lse == -kUnbounded ? kUnbounded : lse * kLog2E;
  };

  // Whether all of a step's rows see all of the keys.
  const int key_end = min(key_begin + kKeys, last_col);
  const auto sees_all = [&](int s) {
    const int first = row_begin + tile_of(s) * kRows, last = first + kRows - 1;
    if (last >= min(row_end, n_selected) || p.rows.index) return false;
    const int from = p.rows.at(first, sequence.n_q) + offset, to = from + kRows - 1;
    return key_begin >= p.window.low(to) && key_end <= p.window.high(from, sequence.n_k);
  };

  float column[kTiles][2];  // of the lane's keys, lane / 4 and that + 8 of each tile
  const float nothing = p.reduce == ScoreReduce::max && p.logits ? -kUnbounded : 0.0f;
  const auto key_of = [&](int t, int half) {
    return key_begin + (warp_index() * kTiles + t) * 16 + 8 * half + lane_index() / 4;
  };
  const auto reset = [&] {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) column[t][0] = column[t][1] = nothing;
  };
  // Writes the column of fold `i` of the block, whose four lanes per key agree first.
  const auto flush = [&](int i) {
    const int folds = p.heads / p.fold, fold = first_head / p.fold + i;
    float* const out = p.out + ((b * folds + fold) * gridDim.z + blockIdx.z) * p.n_cols + sequence.k_begin - first_col;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& x = column[t][half];
        for (int bit = 1; bit < 4; bit *= 2) {
          const float other = __shfl_xor_sync(kFullWarp, x, bit);
          x = p.reduce == ScoreReduce::max ? larger(x, other) : x + other;
        }
        if (lane_index() % 4 == 0 && key_of(t, half) < last_col) out[key_of(t, half)] = x;
      }
    }
  };

  reset();
  if (n_steps == 0) {
    if (!keeps_rows)
      for (int i = 0; i < p.block_heads / p.fold; ++i) flush(i);
    return;
  }
  send_keys(first_head);
  send_queries(0);
  note_rows(0);
  [[maybe_unused]] float folded[kTiles][kRows == kFewScoreRows ? kColumns : 1][4];
  for (int s = 0; s < n_steps; ++s) {
    ptx::cp_async_wait_all();
    __syncthreads();  // the step's rows are here, and nobody needs those of the step before
    const int head = head_of(s), here = s % 2 * kRows;
    if (s + 1 < n_steps) {
      send_queries(s + 1);
      note_rows(s + 1);
    }
    float x[kTiles][kColumns][4];
    multiply_rows<T>(key_tile + warp_index() * kTiles * 16 * pitch, row_tiles + here * pitch, pitch, p.steps, x);
    if (s + 1 < n_steps && head_of(s + 1) / p.group != head / p.group) {
      __syncthreads();  // nobody needs these keys any more
      send_keys(head_of(s + 1));
    }

    // Logits.
    scale_products(p.rule, x);
    if (p.bias.data) {
      const float* const bias = p.bias.head(b, head) + sequence.k_begin * p.bias.token_stride;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = key_of(t, half);
          const float added = key < last_col ? bias[key * p.bias.token_stride] * p.rule.bias_scale : 0.0f;
#pragma unroll
          for (int n = 0; n < kColumns; ++n) x[t][n][2 * half] += added, x[t][n][2 * half + 1] += added;
        }
      }
    }
    const int lane_row = here + lane_index() % 4 * 2;
    if (!sees_all(s)) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const auto low = *reinterpret_cast<const Pack<int, 2>*>(about.low + lane_row + 8 * n);
        const auto high = *reinterpret_cast<const Pack<int, 2>*>(about.high + lane_row + 8 * n);
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) {
          const int key = key_of(i / 4, i % 4 / 2);
          if (key < low.at[i % 2] || key >= high.at[i % 2]) x[i / 4][n][i % 4] = -kUnbounded;
        }
      }
    }
    if (!p.logits) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const auto lse = *reinterpret_cast<const Pack<float, 2>*>(about.lse + lane_row + 8 * n);
#pragma unroll
        for (int i = 0; i < 4 * kTiles; ++i) x[i / 4][n][i % 4] = power_of_two<T>(x[i / 4][n][i % 4] - lse.at[i % 2]);
      }
    }
    if (p.weight.data) {
      const float* const weight = p.weight.head(b, head / p.group) + sequence.k_begin * p.weight.token_stride;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = key_of(t, half);
          const float factor = key < last_col ? weight[key * p.weight.token_stride] : 0.0f;
#pragma unroll
          for (int i = 0; i < 2 * kColumns; ++i) {
            float& value = x[t][i / 2][2 * half + i % 2];
            if (value != -kUnbounded) value *= factor;
          }
        }
      }
    }

    // Heads, row by row.
    if constexpr (kRows == kFewScoreRows) {
      if (p.by_row) {
        const int i_head = s % p.block_heads;
#pragma unroll
        for (int i = 0; i < kTiles * kColumns * 4; ++i) {
          float& value = x[i / 4 / kColumns][i / 4 % kColumns][i % 4];
          float& so_far = folded[i / 4 / kColumns][i / 4 % kColumns][i % 4];
          if (!p.head_max && p.reduce == ScoreReduce::sum) value = counted(value);
          so_far = i_head == 0 ? value : p.head_max ? larger(so_far, value) : so_far + value;
          value = so_far;
        }
        if (i_head + 1 < p.block_heads) continue;
      }
      if (keeps_rows) {
        const int64_t fold = b * (p.heads / p.fold) + first_head / p.fold;
        const int first = row_begin + tile_of(s) * kRows + lane_index() % 4 * 2;
#pragma unroll
        for (int i = 0; i < kTiles * kColumns * 4; ++i) {
          const int key = key_of(i / 4 / kColumns, i % 4 / 2), row = first + i / 4 % kColumns * 8 + i % 2;
          if (key < last_col && row < p.n_rows)
            p.out[(fold * p.n_rows + row) * p.n_cols + sequence.k_begin - first_col + key] =
                x[i / 4 / kColumns][i / 4 % kColumns][i % 4];
        }
        continue;
      }
    }

    // Rows.
    if (p.logits && p.reduce == ScoreReduce::sum) {
#pragma unroll
      for (int i = 0; i < kTiles * kColumns * 4; ++i) {
        float& value = x[i / 4 / kColumns][i / 4 % kColumns][i % 4];
        value = counted(value);
      }
    }
    if (p.reduce == ScoreReduce::max) {
#pragma unroll
      for (int i = 0; i < kTiles * kColumns * 4; ++i) {
        float& top = column[i / 4 / kColumns][i % 4 / 2];
        top = larger(top, x[i / 4 / kColumns][i / 4 % kColumns][i % 4]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTiles * kColumns * 4; ++i)
        column[i / 4 / kColumns][i % 4 / 2] += x[i / 4 / kColumns][i / 4 % kColumns][i % 4];
    }
    const bool fold_ends = p.by_row ? s + 1 == n_steps : (s + 1) % (n_tiles * p.fold) == 0;
    if (fold_ends) {
      flush(p.by_row ? 0 : s / (n_tiles * p.fold));
      reset();
    }
  }
}

// out[c, i] = sum or maximum of pieces [c, 0 ... n_pieces - 1, i], in that order.
template <bool kMaximum>
__global__ void __launch_bounds__(kAttentionThreads)
    reduce_columns_kernel(const float* pieces, float* out, int64_t columns, int n_pieces, int n_cols) {
  const int64_t i = int64_t(blockIdx.x) * kAttentionThreads + threadIdx.x;
  if (i >= columns * n_cols) return;
  const float* const first = pieces + i / n_cols * n_pieces * n_cols + i % n_cols;
  float total = first[0];
  for (int piece = 1; piece < n_pieces; ++piece) {
    const float value = first[int64_t(piece) * n_cols];
    total = kMaximum ? larger(total, value) : total + value;
  }
  out[i] = total;
}

}  // namespace fastok::cuda
