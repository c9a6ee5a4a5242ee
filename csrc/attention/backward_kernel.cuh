// The gradient of attention on CUDA. A block keeps a tile of queries (of keys) and lets the keys (the queries) that see
// each other go by; from both products of a pair of tiles it has the probabilities and their gradient, and adds these
// times the passing rows to sums that never leave the registers. No atomics: every gradient has one owner. Torch-free.
//   S = Q K^T   P = exp(S - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - delta)   dQ = dS K   dK = dS^T Q
#pragma once
#include "attention/attention_kernel.cuh"
#include "attention/backward_plan.h"

namespace fastok::cuda {

struct BackwardParams {
  TokenHeads q, k, v, out, d_out;
  Sequences sequences;
  Window window;
  LogitRule rule;
  HeadNumbers bias, lse, d_lse;  // as given; natural logarithm
  int heads, group;              // query heads, and those of one KV head
  int width, v_width;
  float scale;

  // Of each row, by note_rows_kernel: [B, H, S], packed [H, total].
  float *row_lse, *row_delta;
  int64_t row_batch_stride, row_head_stride, rows;

  void *d_q, *d_k, *d_v;  // like q, k and v, contiguous
  float* d_bias;          // [B, H, T], or [B, G, T] summed over the query heads of a KV head; nullptr: not asked for
  bool bias_by_head;
};

// ---- what is known of the rows --------------------------------------------------------------------------------------

// One warp per row: its log-sum-exp to base 2, +inf where nothing is to come out, and delta, dO * O - dlse.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads) note_rows_kernel(const BackwardParams p) {
  const int64_t row = int64_t(blockIdx.x) * kAttentionWarps + warp_index();
  if (row >= p.rows) return;
  const int64_t b = row / p.row_batch_stride, token = row % p.row_head_stride;
  const int head = int(row % p.row_batch_stride / p.row_head_stride);
  constexpr int kElements = 16 / int(sizeof(T));
  const T* const out = p.out.head<T>(b, head) + token * p.out.token_stride;
  const T* const d_out = p.d_out.head<T>(b, head) + token * p.d_out.token_stride;
  float sum = 0;
  for (int column = lane_index() * kElements; column < p.v_width; column += kWarpSize * kElements) {
    const auto x = *reinterpret_cast<const Pack<T, kElements>*>(out + column);
    const auto y = *reinterpret_cast<const Pack<T, kElements>*>(d_out + column);
#pragma unroll
    for (int i = 0; i < kElements; ++i) sum += widen(x.at[i]) * widen(y.at[i]);
  }
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(kFullWarp, sum, bit);
  if (lane_index() != 0) return;
  const float lse = p.lse.head(b, head)[token * p.lse.token_stride];
  const bool nothing = lse == -kUnbounded;  // whose log-sum-exp is a constant
  if (p.d_lse.data && !nothing) sum -= p.d_lse.head(b, head)[token * p.d_lse.token_stride];
  p.row_lse[row] = nothing ? kUnbounded : lse * kLog2E;
  p.row_delta[row] = sum;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// Writes a warp's sums, times a factor, as rows through its rows of a tile that only it has read.
template <class T, int kPitch, int kColumns, class RowOf>
__device__ __forceinline__ void write_sums(const float (&sums)[1][kColumns][4], float factor, int width,
                                           unsigned char* tile, const RowOf& row_of) {
  __syncwarp();
#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      put_pair<T>(tile + (lane_index() / 4 + 8 * half) * kPitch + value_column<T>(n, 0) * int(sizeof(T)),
                  sums[0][n][2 * half] * factor, sums[0][n][2 * half + 1] * factor);
  }
  __syncwarp();
  constexpr int kElements = 16 / int(sizeof(T));
  for (int i = lane_index() / 8; i < 16; i += 4) {
    T* const row = row_of(i);
    if (row == nullptr) break;
    for (int column = lane_index() % 8 * kElements; column < width; column += 8 * kElements) {
      uint32_t words[4];
      memcpy(words, tile + i * kPitch + column * int(sizeof(T)), sizeof words);
      ptx::st_global_16(row + column, words);
    }
  }
}

// Grid: slots of tiles of queries, heads; or slots of tiles of keys, KV heads.
template <class T, int kWidth, GradientOf kOf>
__global__ void __launch_bounds__(kAttentionThreads, 2) gradient_kernel(const BackwardParams p) {
  constexpr bool kQueries = kOf == GradientOf::queries;
  constexpr bool kOfA = kOf != GradientOf::values;                                        // dQ or dK, from dS
  constexpr bool kOfB = kOf == GradientOf::values || kOf == GradientOf::keys_and_values;  // dV, from P
  constexpr int kKept = gradient_kept(kWidth, sizeof(T)), kPassing = gradient_passing(kWidth, sizeof(T));
  constexpr int kStages = gradient_stages(kWidth, sizeof(T)), kPitch = tile_pitch(kWidth, sizeof(T));
  constexpr int kColumns = kPassing / 8, kSums = kWidth / 8;
  // A: queries and keys, whose product is S. B: dO and values, whose product is dP.
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  auto* const kept_a = memory.take<unsigned char>(kKept * kPitch, "kept_a");
  auto* const kept_b = memory.take<unsigned char>(kKept * kPitch, "kept_b");
  auto* const passing_a = memory.take<unsigned char>(kStages * kPassing * kPitch, "passing_a");
  auto* const passing_b = memory.take<unsigned char>(kStages * kPassing * kPitch, "passing_b");
  auto* const passing_lse = memory.take<float>(kStages * kPassing, "passing_lse");  // of keys: the bias
  auto* const passing_delta = memory.take<float>(kStages * kPassing, "passing_delta");

  // Which rows, and which ones go by.
  const Sequence sequence =
      p.sequences.find(blockIdx.x, !kQueries, kQueries ? p.sequences.n_q : p.sequences.n_k, 1, kKept);
  const int n_kept = kQueries ? sequence.n_q : sequence.n_k;
  const int tiles = (n_kept + kKept - 1) / kKept;
  if (sequence.tile >= tiles) return;
  // Under a causal mask the last queries and the first keys take longest, and go first.
  const int begin = (kQueries ? tiles - 1 - sequence.tile : sequence.tile) * kKept, end = min(begin + kKept, n_kept);
  const int offset = sequence.n_k - sequence.n_q;
  int first, last;
  if constexpr (kQueries) {
    first = p.window.low(begin + offset), last = p.window.high(end - 1 + offset, sequence.n_k);
  } else {
    first = max(begin - p.window.right - offset, 0);
    last = int(min(int64_t(sequence.n_q), int64_t(end) + p.window.left - offset));
  }
  first = first / kPassing * kPassing;
  const int n_tiles = last > first ? (last - first + kPassing - 1) / kPassing : 0;
  const int64_t b = sequence.batch;
  const int kv_head = kQueries ? int(blockIdx.y) / p.group : int(blockIdx.y);
  const int heads = kQueries ? 1 : p.group, first_head = kQueries ? int(blockIdx.y) : kv_head * p.group;
  const int n_steps = n_tiles * heads;
  const auto head_of = [&](int s) { return first_head + s / n_tiles; };
  const auto passing_of = [&](int s) { return first + s % n_tiles * kPassing; };

  const auto send = [&](unsigned char* tile, int rows, const TokenHeads& of, int head, bool queries, int width,
                        int from) {
    const int count = queries ? sequence.n_q : sequence.n_k;
    const T* const data = of.head<T>(b, head) + (queries ? sequence.q_begin : sequence.k_begin) * of.token_stride;
    send_rows(tile, kPitch, rows, width, depth_steps(kWidth, sizeof(T)), data,
              [&](int i) -> const T* { return from + i < count ? data + (from + i) * of.token_stride : nullptr; });
  };
  const auto send_passing = [&](int s) {
    const int stage = s % kStages * kPassing, head = kQueries ? kv_head : head_of(s), from = passing_of(s);
    send(passing_a + stage * kPitch, kPassing, kQueries ? p.k : p.q, head, !kQueries, p.width, from);
    send(passing_b + stage * kPitch, kPassing, kQueries ? p.v : p.d_out, head, !kQueries, p.v_width, from);
    const int i = int(threadIdx.x);
    if (i >= kPassing) return;
    if constexpr (kQueries) {
      const bool biased = p.bias.data && from + i < sequence.n_k;
      const float* const bias = p.bias.head(b, first_head);
      passing_lse[stage + i] =
          biased ? bias[(sequence.k_begin + from + i) * p.bias.token_stride] * p.rule.bias_scale : 0.0f;
    } else {
      const bool inside = from + i < sequence.n_q;
      const int64_t row = b * p.row_batch_stride + head * p.row_head_stride + sequence.q_begin + from + i;
      passing_lse[stage + i] = inside ? p.row_lse[row] : kUnbounded;
      passing_delta[stage + i] = inside ? p.row_delta[row] : 0.0f;
    }
  };

  // What a lane knows of its two rows.
  const int warp_row = warp_index() * 16, lane_row = begin + warp_row + lane_index() / 4;
  float lse[2], delta[2], bias[2] = {0, 0}, bias_sum[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_row + 8 * half;
    const bool inside = kQueries && row < sequence.n_q;
    const int64_t at = b * p.row_batch_stride + first_head * p.row_head_stride + sequence.q_begin + row;
    lse[half] = inside ? p.row_lse[at] : kUnbounded;
    delta[half] = inside ? p.row_delta[at] : 0.0f;
  }
  const auto load_bias = [&]([[maybe_unused]] int head) {
    if constexpr (!kQueries) {
#pragma unroll
      for (int half = 0; half < 2 && p.bias.data; ++half) {
        const int key = lane_row + 8 * half;
        const float* const of_head = p.bias.head(b, head) + sequence.k_begin * p.bias.token_stride;
        bias[half] = key < sequence.n_k ? of_head[key * p.bias.token_stride] * p.rule.bias_scale : 0.0f;
      }
    }
  };
  // Writes the sums of a bias; the four lanes that share keys agree first.
  const auto flush_bias = [&]([[maybe_unused]] int head) {
    if constexpr (!kQueries && kOfA) {
      if (!p.d_bias) return;
      const int bias_heads = p.bias_by_head ? p.heads : p.heads / p.group, at = p.bias_by_head ? head : kv_head;
      float* const of_head = p.d_bias + (b * bias_heads + at) * p.sequences.n_k + sequence.k_begin;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for (int bit = 1; bit < 4; bit *= 2) bias_sum[half] += __shfl_xor_sync(kFullWarp, bias_sum[half], bit);
        if (lane_index() % 4 == 0 && warp_row < kKept && lane_row + 8 * half < sequence.n_k)
          of_head[lane_row + 8 * half] = bias_sum[half];
        bias_sum[half] = 0;
      }
    }
  };

  float sums_a[1][kOfA ? kSums : 1][4] = {}, sums_b[1][kOfB ? kSums : 1][4] = {};
  if (n_steps > 0) {
    send(kept_a, kKept, kQueries ? p.q : p.k, kQueries ? first_head : kv_head, kQueries, p.width, begin);
    if constexpr (kOfA)
      send(kept_b, kKept, kQueries ? p.d_out : p.v, kQueries ? first_head : kv_head, kQueries, p.v_width, begin);
    send_passing(0);
  }
  for (int s = 0; s < n_steps; ++s) {
    ptx::cp_async_wait_all();
    __syncthreads();  // the step's rows are here, and nobody needs those of the step before
    if (kStages == 2 && s + 1 < n_steps) send_passing(s + 1);
    const int stage = s % kStages * kPassing, from = passing_of(s), head = head_of(s);
    if (s % n_tiles == 0) load_bias(head);
    if (kKept == kAttentionWarps * 16 || warp_row < kKept) {
      float x[1][kColumns][4];
      [[maybe_unused]] float y[1][kColumns][4];
      multiply_rows<T>(kept_a + warp_row * kPitch, passing_a + stage * kPitch, kPitch, depth_steps(p.width, sizeof(T)),
                       x);
      if constexpr (kOfA)
        multiply_rows<T>(kept_b + warp_row * kPitch, passing_b + stage * kPitch, kPitch,
                         depth_steps(p.v_width, sizeof(T)), y);
      scale_products(p.rule, x);

      // Which of the passing rows see or are seen, counted from the lane's first.
      const int query = kQueries ? begin : from, query_end = min(query + (kQueries ? kKept : kPassing), sequence.n_q);
      const int key = kQueries ? from : begin, key_end = kQueries ? key + kPassing : end;
      const bool everything =
          key >= p.window.low(query_end - 1 + offset) && key_end <= p.window.high(query + offset, sequence.n_k);
      int low[2] = {0, 0}, high[2] = {kPassing, kPassing};
      if (!everything) {
        const int lane_first = from + lane_index() % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = lane_row + 8 * half;
          low[half] = (kQueries ? p.window.low(row + offset) : row - offset - p.window.right) - lane_first;
          high[half] = (kQueries ? p.window.high(row + offset, sequence.n_k)
                                 : int(min(int64_t(kFarAway), int64_t(row) - offset + p.window.left + 1))) -
                       lane_first;
        }
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const int column = stage + 8 * n + lane_index() % 4 * 2;
        const auto of_row = *reinterpret_cast<const Pack<float, 2>*>(passing_lse + column);
        Pack<float, 2> delta_of_row{};
        if constexpr (!kQueries) delta_of_row = *reinterpret_cast<const Pack<float, 2>*>(passing_delta + column);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int half = e / 2, j = e % 2;
          const float logit = x[0][n][e];
          const float shift = kQueries ? of_row.at[j] - lse[half] : bias[half] - of_row.at[j];
          const bool seen = everything || (8 * n + j >= low[half] && 8 * n + j < high[half]);
          const float power = seen ? power_of_two<T>(logit + shift) : 0.0f;
          x[0][n][e] = power;
          if constexpr (kOfA) {
            float slope = power * (y[0][n][e] - (kQueries ? delta[half] : delta_of_row.at[j]));
            if (!seen) slope = 0;
            if constexpr (!kQueries) bias_sum[half] += slope;
            if (p.rule.cap > 0) slope *= 1 - logit / p.rule.cap * (logit / p.rule.cap);
            y[0][n][e] = slope;
          }
        }
      }
      if constexpr (kOfB) add_values<T, kPitch>(x, passing_b + stage * kPitch, sums_b);
      if constexpr (kOfA) add_values<T, kPitch>(y, passing_a + stage * kPitch, sums_a);
    }
    if (p.bias_by_head && (s + 1) % n_tiles == 0) flush_bias(head);
    if (kStages == 1 && s + 1 < n_steps) {
      __syncthreads();  // nobody needs this step's rows any more
      send_passing(s + 1);
    }
  }
  if (!p.bias_by_head) flush_bias(first_head);
  for (int i = 0; p.bias_by_head && n_steps == 0 && i < heads; ++i) flush_bias(first_head + i);

  if (warp_row >= kKept) return;
  const auto row_of = [&](void* result, int n_heads, int head, int64_t width, int i) -> T* {
    const int row = begin + warp_row + i;
    if (row >= n_kept) return nullptr;
    const int64_t token =
        kQueries ? b * p.sequences.n_q + sequence.q_begin + row : b * p.sequences.n_k + sequence.k_begin + row;
    return static_cast<T*>(result) + (token * n_heads + head) * width;
  };
  const int kv_heads = p.heads / p.group;
  if constexpr (kOfA)
    write_sums<T, kPitch>(sums_a, p.scale, p.width, kept_a + warp_row * kPitch, [&](int i) {
      return kQueries ? row_of(p.d_q, p.heads, first_head, p.width, i) : row_of(p.d_k, kv_heads, kv_head, p.width, i);
    });
  if constexpr (kOfB)
    write_sums<T, kPitch>(sums_b, 1.0f, p.v_width, kept_b + warp_row * kPitch,
                          [&](int i) { return row_of(p.d_v, kv_heads, kv_head, p.v_width, i); });
}

}  // namespace fastok::cuda
