// Column sums of the attention matrix on Hopper: a block keeps a tile of keys in shared memory while the hardware
// streams the selected query rows past it, and each row's products become probabilities by its finished log-sum-exp. A
// lane adds up two keys' columns in registers, in ascending order of the rows; no atomics. Torch-free.
#pragma once
#include "attention/sm90_tile.cuh"

namespace fastok::cuda::sm90 {

// Grid: slots of key tiles, heads, parts of the rows.
template <class T, int kWidth>
__global__ void __launch_bounds__(threads(kScoreGroups), 1)
    scores_sm90_kernel(const __grid_constant__ ScoreSumParams params) {
  constexpr int kStages = score_stages(kWidth), kColumns = kTile / 8;
  constexpr int kTileBytes = int(tile_bytes(kTile, kWidth));
  const ScoreParams& p = params.p;
  FASTOK_SHARED_TILES(shared);
  SharedMemory memory(shared);
  auto* const key_tile = memory.take<unsigned char>(kTileBytes, "key_tile", ptx::kSwizzleBlock);
  auto* const query_tiles = memory.take<unsigned char>(kStages * kTileBytes, "query_tiles", ptx::kSwizzleBlock);
  auto* const lse_tiles = memory.take<float>(kStages * kTile, "lse_tiles");
  auto* const barriers = memory.take<ptx::Mbarrier>(1 + 2 * kStages, "barriers");
  ptx::Mbarrier& keys = barriers[0];
  const Ring<kStages> queries{barriers + 1, barriers + 1 + kStages};

  // Which keys, and which of the selected rows: those of this part that may see some of them.
  const Sequence sequence = p.sequences.find(blockIdx.x, true, p.col_end - p.col_begin, 1, kTile);
  const int first_col = p.sequences.packed() ? 0 : p.col_begin;
  const int last_col = p.sequences.packed() ? sequence.n_k : p.col_end;
  const int key_begin = first_col + sequence.tile * kTile, key_end = min(key_begin + kTile, last_col);
  if (key_begin >= last_col) return;
  const int head = int(blockIdx.y), first_row = p.rows.first(sequence.n_q);
  // What row i stands at, as if it were a key; rows are counted from the first selected one.
  const int offset = first_row + sequence.n_k - sequence.n_q;
  const int n_selected = p.rows.count(sequence.n_q);
  int row_begin = int(blockIdx.z) * p.part_rows;
  int row_end = blockIdx.z + 1 < gridDim.z ? min(row_begin + p.part_rows, n_selected) : n_selected;
  row_begin = int(max(int64_t(row_begin), int64_t(key_begin) - p.window.right - offset));
  row_end = int(min(int64_t(row_end), int64_t(key_end) - 1 + p.window.left - offset + 1));
  const int n_tiles = row_end > row_begin ? (row_end - row_begin + kTile - 1) / kTile : 0;
  // Warpgroups that have any keys; the other takes no part.
  const int active = (key_end - key_begin + kGroupRows - 1) / kGroupRows;

  if (threadIdx.x == 0) {
    ptx::mbarrier_init(keys, 1);
    queries.initialise(1 + kWarpSize, 4 * active);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x < kGroupThreads) {
    ptx::setmaxnreg_dec<copy_registers(kScoreGroups)>();
    if (threadIdx.x == 0 && n_tiles > 0) {
      ptx::mbarrier_arrive_expect_tx(keys, kTileBytes);
      send_tokens<kWidth>(key_tile, kTile, params.k, keys, sequence.k_begin + key_begin, head / p.group,
                          sequence.batch);
      for (int i = 0; i < n_tiles; ++i) {
        const int stage = queries.stage(i);
        queries.wait_empty(i);
        ptx::mbarrier_arrive_expect_tx(queries.full[stage], kTileBytes);
        send_tokens<kWidth>(query_tiles + stage * kTileBytes, kTile, params.q, queries.full[stage],
                            sequence.q_begin + first_row + row_begin + i * kTile, head, sequence.batch);
      }
    } else if (warp_index() == 1) {
      // To base 2 and negated; of rows that see nothing nothing is to come out.
      const float* const lse = p.lse.head(sequence.batch, head);
      for (int i = 0; i < n_tiles; ++i) {
        queries.wait_empty(i);
        for (int j = lane_index(); j < kTile; j += kWarpSize) {
          const int row = row_begin + i * kTile + j;
          float value = -kUnbounded;
          if (row < row_end)
            value = lse[(p.lse_by_item ? row : sequence.q_begin + first_row + row) * p.lse.token_stride];
          lse_tiles[queries.stage(i) * kTile + j] = value == -kUnbounded ? -kUnbounded : -value * kLog2E;
        }
        ptx::mbarrier_arrive(queries.full[queries.stage(i)]);
      }
    }
    return;
  }
  const int group = int(threadIdx.x) / kGroupThreads - 1;
  if (group >= active) return;
  ptx::setmaxnreg_inc<compute_registers(kScoreGroups)>();

  const unsigned char* const my_keys = key_tile + group * kGroupRows * ptx::kSwizzleRow;
  // Of the lane's two keys: where it is, which rows see it, its bias, and the sum of its column.
  int key[2], from[2], to[2];
  float bias[2], column[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    key[half] = key_begin + group * kGroupRows + warp_index() % 4 * 16 + 8 * half + lane_index() / 4;
    from[half] = int(max(int64_t(row_begin), int64_t(key[half]) - p.window.right - offset));
    to[half] = int(min(int64_t(row_end), int64_t(key[half]) + p.window.left - offset + 1));
    const bool inside = p.bias.data && key[half] < last_col;
    bias[half] = inside ? p.bias.head(sequence.batch, head)[(sequence.k_begin + key[half]) * p.bias.token_stride] *
                              p.rule.bias_scale
                        : 0.0f;
  }
  // Rows that see all of the tile's keys.
  const int seen_from = int(max(int64_t(row_begin), int64_t(key_end) - 1 - p.window.right - offset));
  const int seen_to = int(min(int64_t(row_end), int64_t(key_begin) + p.window.left - offset + 1));

  const auto start_logits = [&](int i, float (&x)[kColumns][4]) {
    queries.wait_full(i);
    multiply_tiles<T, kWidth>(my_keys, kTile, query_tiles + queries.stage(i) * kTileBytes, kTile, x);
  };
  const auto add_rows = [&](int i, float (&x)[kColumns][4]) {
    const float* const lse_tile = lse_tiles + queries.stage(i) * kTile + lane_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const auto shift = *reinterpret_cast<const Pack<float, 2>*>(lse_tile + 8 * n);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = power_of_two<T>(fmaf(x[n][e], p.rule.scale, bias[e / 2] + shift.at[e % 2]));
    }
    queries.release(i);
    const int row = row_begin + i * kTile;
    if (row < seen_from || row + kTile > seen_to) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int first = from[half] - row - lane_index() % 4 * 2, last = to[half] - row - lane_index() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const bool seen = 8 * n + j >= first && 8 * n + j < last;
            if (!seen) x[n][2 * half + j] = 0;
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) column[e / 2] += x[n][e];
    }
  };

  if (n_tiles > 0) {
    // The next tile's products run beside the powers of this one.
    float x[2][kColumns][4];
    ptx::mbarrier_wait(keys, 0);
    start_logits(0, x[0]);
    int i = 0;
    for (; i + 2 < n_tiles; i += 2) {
      start_logits(i + 1, x[1]);
      ptx::wgmma_wait_group<1>();
      add_rows(i, x[0]);
      start_logits(i + 2, x[0]);
      ptx::wgmma_wait_group<1>();
      add_rows(i + 1, x[1]);
    }
    if (i + 1 < n_tiles) {
      start_logits(i + 1, x[1]);
      ptx::wgmma_wait_group<1>();
      add_rows(i, x[0]);
      ptx::wgmma_wait_group<0>();
      add_rows(i + 1, x[1]);
    } else {
      ptx::wgmma_wait_group<0>();
      add_rows(i, x[0]);
    }
  }

  // The four lanes of a key agree.
  float* const out = p.out + ((int64_t(sequence.batch) * p.heads + head) * gridDim.z + blockIdx.z) * p.n_cols +
                     sequence.k_begin - first_col;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = column[half];
    for (int bit = 1; bit < 4; bit *= 2) sum += __shfl_xor_sync(kFullWarp, sum, bit);
    if (lane_index() % 4 != 0 || key[half] >= last_col) continue;
    if (p.weight.data)
      sum *= p.weight.head(sequence.batch, head / p.group)[(sequence.k_begin + key[half]) * p.weight.token_stride];
    out[key[half]] = sum;
  }
}

}  // namespace fastok::cuda::sm90
