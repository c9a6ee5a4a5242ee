// Attention on Hopper. One warp has the hardware copy tiles of queries, keys and values; two or three warpgroups of 64
// rows each take turns at the tensor cores, and while one computes its softmax the others' products run. A warpgroup's
// own next logits are computed beside its values. FlashAttention-3, Shah et al., 2024. Torch-free.
#pragma once
#include "attention/sm90_tile.cuh"

namespace fastok::cuda::sm90 {

// Barriers of a block besides the one of all its threads.
enum : int { kTurnBarrier = 1, kGroupBarrier = 4, kTailBarrier = 7 };

// The powers as factors of a product: two neighbouring blocks of columns are one tile of it.
template <class T>
__device__ __forceinline__ void pack_powers(const float (&x)[kTile / 8][4], uint32_t (&packed)[kTile / 16][4]) {
#pragma unroll
  for (int i = 0; i < kTile / 4; ++i) {
    const float* const pair = &x[i / 4 * 2 + i % 4 / 2][i % 2 * 2];
    packed[i / 4][i % 4] =
        std::is_same_v<T, f16> ? ptx::cvt_rn_f16x2(pair[0], pair[1]) : ptx::cvt_rn_bf16x2(pair[0], pair[1]);
  }
}

// out += powers times a tile of values.
template <class T, int kWidth>
__device__ __forceinline__ void multiply_values(uint32_t (&powers)[kTile / 16][4], const unsigned char* values,
                                                float (&out)[kWidth / 8][4]) {
  ptx::keep_in_place(powers);
  ptx::keep_in_place(out);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step)
    ptx::wgmma_columns<T, kWidth>(
        out, powers[step], ptx::columns_descriptor(values + step * 16 * ptx::kSwizzleRow, kTile * ptx::kSwizzleRow));
  ptx::wgmma_commit_group();
}

// Grid: slots of row tiles, heads.
template <class T, int kWidth>
__global__ void __launch_bounds__(threads(groups(kWidth)), 1)
    attention_sm90_kernel(const __grid_constant__ ForwardParams params) {
  constexpr int kGroups = groups(kWidth), kStages = stages(kWidth), kRows = kGroups * kGroupRows;
  constexpr int kColumns = kTile / 8, kValueColumns = kWidth / 8;
  constexpr int kQueryBytes = int(tile_bytes(kGroupRows, kWidth)), kKeyBytes = int(tile_bytes(kTile, kWidth));
  const AttentionParams& p = params.p;
  FASTOK_SHARED_TILES(shared);
  SharedMemory memory(shared);
  auto* const query_tiles = memory.take<unsigned char>(kGroups * kQueryBytes, "query_tiles", ptx::kSwizzleBlock);
  auto* const key_tiles = memory.take<unsigned char>(kStages * kKeyBytes, "key_tiles", ptx::kSwizzleBlock);
  auto* const value_tiles = memory.take<unsigned char>(kStages * kKeyBytes, "value_tiles", ptx::kSwizzleBlock);
  auto* const bias_tiles = memory.take<float>(kStages * kTile, "bias_tiles");
  auto* const barriers = memory.take<ptx::Mbarrier>(1 + 4 * kStages, "barriers");
  ptx::Mbarrier& queries = barriers[0];
  const Ring<kStages> keys{barriers + 1, barriers + 1 + kStages};
  const Ring<kStages> values{barriers + 1 + 2 * kStages, barriers + 1 + 3 * kStages};

  // Which rows, and which keys they see. Under a causal mask the last tile takes longest and goes first.
  const Sequence sequence = p.sequences.find(blockIdx.x, false, p.sequences.n_q, 1, kRows);
  const int row_tiles = (sequence.n_q + kRows - 1) / kRows;
  if (sequence.tile >= row_tiles) return;
  const int head = int(blockIdx.y), first_row = (row_tiles - 1 - sequence.tile) * kRows;
  const int offset = sequence.n_k - sequence.n_q, last_row = min(first_row + kRows, sequence.n_q) - 1;
  const int begin = p.window.low(first_row + offset) / kTile * kTile;
  const int end = p.window.high(last_row + offset, sequence.n_k);
  const int n_tiles = end > begin ? (end - begin + kTile - 1) / kTile : 0;
  // Warpgroups that have any rows; the others take no part.
  const int active = min((sequence.n_q - first_row + kGroupRows - 1) / kGroupRows, kGroups);

  const bool has_bias = p.bias.data != nullptr;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(queries, 1);
    keys.initialise(has_bias ? 1 + kWarpSize : 1, 4 * active);
    values.initialise(1, 4 * active);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x < kGroupThreads) {
    ptx::setmaxnreg_dec<copy_registers(kGroups)>();
    const int kv_head = head / p.group;
    if (threadIdx.x == 0 && n_tiles > 0) {
      ptx::mbarrier_arrive_expect_tx(queries, active * kQueryBytes);
      for (int i = 0; i < active; ++i)
        send_tokens<kWidth>(query_tiles + i * kQueryBytes, kGroupRows, params.q, queries,
                            sequence.q_begin + first_row + i * kGroupRows, head, sequence.batch);
      for (int i = 0; i < n_tiles; ++i) {
        const int stage = keys.stage(i), token = sequence.k_begin + begin + i * kTile;
        keys.wait_empty(i);
        ptx::mbarrier_arrive_expect_tx(keys.full[stage], kKeyBytes);
        send_tokens<kWidth>(key_tiles + stage * kKeyBytes, kTile, params.k, keys.full[stage], token, kv_head,
                            sequence.batch);
        values.wait_empty(i);
        ptx::mbarrier_arrive_expect_tx(values.full[stage], kKeyBytes);
        send_tokens<kWidth>(value_tiles + stage * kKeyBytes, kTile, params.v, values.full[stage], token, kv_head,
                            sequence.batch);
      }
    } else if (warp_index() == 1 && has_bias) {
      const float* const bias = p.bias.head(sequence.batch, head) + sequence.k_begin * p.bias.token_stride;
      for (int i = 0; i < n_tiles; ++i) {
        keys.wait_empty(i);
        for (int j = lane_index(); j < kTile; j += kWarpSize) {
          const int key = begin + i * kTile + j;
          bias_tiles[keys.stage(i) * kTile + j] =
              key < sequence.n_k ? bias[key * p.bias.token_stride] * p.rule.bias_scale : 0.0f;
        }
        ptx::mbarrier_arrive(keys.full[keys.stage(i)]);
      }
    }
    return;
  }
  const int group = int(threadIdx.x) / kGroupThreads - 1;
  if (group >= active) return;
  ptx::setmaxnreg_inc<compute_registers(kGroups)>();

  const int warp_row = warp_index() % 4 * 16;
  const int group_position = first_row + group * kGroupRows + offset;
  unsigned char* const my_queries = query_tiles + group * kQueryBytes;
  // Keys that all of the group's rows see, and those that each of the lane's two does.
  const int seen_from = p.window.low(group_position + kGroupRows - 1);
  const int seen_to = p.window.high(group_position, sequence.n_k);
  int low[2], high[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = group_position + warp_row + 8 * half + lane_index() / 4;
    low[half] = p.window.low(position), high[half] = p.window.high(position, sequence.n_k);
  }

  OnlineSoftmax<1> softmax;
  softmax.reset();
  const float unit = has_bias ? 1.0f : p.rule.scale;
  float x[1][kColumns][4], shrink[1][2], out[kValueColumns][4] = {};
  uint32_t powers[kTile / 16][4];

  const auto start_logits = [&](int i) {
    multiply_tiles<T, kWidth>(my_queries, kGroupRows, key_tiles + keys.stage(i) * kKeyBytes, kTile, x[0]);
  };
  const auto start_values = [&](int i) {
    multiply_values<T, kWidth>(powers, value_tiles + values.stage(i) * kKeyBytes, out);
  };
  // From finished products to powers.
  const auto finish_logits = [&](int i) {
    if (has_bias) {
      const float* const bias_tile = bias_tiles + keys.stage(i) * kTile + lane_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const auto added = *reinterpret_cast<const Pack<float, 2>*>(bias_tile + 8 * n);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[0][n][e] = fmaf(x[0][n][e], p.rule.scale, added.at[e % 2]);
      }
    }
    keys.release(i);
    const int key = begin + i * kTile;
    if (key < seen_from || key + kTile > seen_to) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // From the lane's first key, so that columns are compared as the constants that they are.
        const int from = low[half] - key - lane_index() % 4 * 2, to = high[half] - key - lane_index() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const bool seen = 8 * n + j >= from && 8 * n + j < to;
            if (!seen) x[0][n][2 * half + j] = -kUnbounded;
          }
        }
      }
    }
    softmax.template advance<T>(x, shrink, unit);
  };

  if (n_tiles > 0) {
    ptx::mbarrier_wait(queries, 0);
    keys.wait_full(0);
    start_logits(0);
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_place(x[0]);
    finish_logits(0);
    pack_powers<T>(x[0], powers);
    // Turns go round: the last group gives the first one its first.
    constexpr int kBoth = 2 * kGroupThreads;
    const bool turns = active > 1;
    if (turns && group == active - 1 && n_tiles > 1) ptx::bar_arrive(kTurnBarrier, kBoth);
    for (int i = 1; i < n_tiles; ++i) {
      keys.wait_full(i);
      if (turns) ptx::bar_sync(kTurnBarrier + group, kBoth);
      start_logits(i);
      values.wait_full(i - 1);
      start_values(i - 1);
      if (turns && (group < active - 1 || i + 1 < n_tiles))
        ptx::bar_arrive(kTurnBarrier + (group + 1 < active ? group + 1 : 0), kBoth);
      ptx::wgmma_wait_group<1>();
      ptx::keep_in_place(x[0]);
      finish_logits(i);
      ptx::wgmma_wait_group<0>();
      ptx::keep_in_place(out);
      ptx::keep_in_place(powers);
      values.release(i - 1);
#pragma unroll
      for (int e = 0; e < kWidth / 2; ++e) out[e / 4][e % 4] *= shrink[0][e % 4 / 2];
      pack_powers<T>(x[0], powers);
    }
    values.wait_full(n_tiles - 1);
    // What lies behind a packed sequence is another one's, and may be infinite: nothing times that is not nothing.
    unsigned char* const last_values = value_tiles + values.stage(n_tiles - 1) * kKeyBytes;
    const int rest = sequence.n_k - begin - (n_tiles - 1) * kTile;
    if (p.sequences.packed() && rest < kTile) {
      for (int chunk = 0; chunk < kWidth / kChunk; ++chunk) {
        unsigned char* const rows = last_values + chunk * kTile * ptx::kSwizzleRow;
        for (int i = rest * ptx::kSwizzleRow + (int(threadIdx.x) - kGroupThreads) * 16; i < kTile * ptx::kSwizzleRow;
             i += active * kGroupThreads * 16)
          *reinterpret_cast<Pack<uint32_t, 4>*>(rows + i) = {};
      }
      ptx::fence_proxy_async();
      ptx::bar_sync(kTailBarrier, active * kGroupThreads);
    }
    start_values(n_tiles - 1);
    ptx::wgmma_wait_group<0>();
    ptx::keep_in_place(out);
  }
  softmax.agree();

  // Results leave through the group's own queries, so that whole rows are written; chunks swizzled by hand.
  ptx::bar_sync(kGroupBarrier + group, kGroupThreads);
  constexpr int kPitch = kWidth * 2;
  unsigned char* const results = my_queries + warp_row * kPitch;
  const int warp_first = first_row + group * kGroupRows + warp_row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = 8 * half + lane_index() / 4, row = warp_first + i;
    if (row < sequence.n_q && lane_index() % 4 == 0)
      p.lse[sequence.batch * p.lse_batch_stride + head * p.lse_head_stride + sequence.q_begin + row] =
          softmax.log_sum(0, half, unit) * kLn2;
    const float inverse = softmax.inverse(0, half);
#pragma unroll
    for (int n = 0; n < kValueColumns; ++n)
      put_pair<T>(results + i * kPitch + (n ^ i % 8) * 16 + lane_index() % 4 * 4, out[n][2 * half] * inverse,
                  out[n][2 * half + 1] * inverse);
  }
  __syncwarp();
  constexpr int kChunks = kPitch / 16;
#pragma unroll
  for (int at = lane_index(); at < 16 * kChunks; at += kWarpSize) {
    const int i = at / kChunks, chunk = at % kChunks, row = warp_first + i;
    if (row >= sequence.n_q || chunk * 8 >= p.v_width) continue;
    uint32_t words[4];
    memcpy(words, results + i * kPitch + (chunk ^ i % 8) * 16, sizeof words);
    const int64_t token = (int64_t(sequence.batch) * p.sequences.n_q + sequence.q_begin + row) * p.heads + head;
    ptx::st_global_16(static_cast<T*>(p.out) + token * p.v_width + chunk * 8, words);
  }
}

}  // namespace fastok::cuda::sm90
