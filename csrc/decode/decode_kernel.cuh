// Decode attention on CUDA: few query rows over a dense or paged cache, or over a list of its tokens. A block has up to
// 16 rows of one KV head's queries and a split of the keys, a warp every fourth tile of those; warps are merged in
// shared memory, splits by combine_splits_kernel, both in ascending order. Torch-free.
#pragma once
#include "attention/attention_kernel.cuh"
#include "common/integers.cuh"
#include "decode/decode_plan.h"

namespace fastok::cuda {

struct DecodeParams {
  TokenHeads q, k, v;  // k and v: by page (a sequence is one without a table), token of the page and head
  Integers table;      // [B, pages]: a sequence's pages in order; none: as many pages as sequences
  int64_t table_batch_stride, table_stride;
  int page;          // tokens
  int pages;         // that there are
  Integers lengths;  // [B] or [B, KV heads]
  bool lengths_by_head;
  int total;  // tokens that there is room for

  const int* tokens;        // [B, lists, list_size] ascending, none twice; nullptr: all
  const int* token_counts;  // [B, lists]
  int lists, list_size;

  LogitRule rule;
  HeadNumbers bias;  // by place in the sequence
  int rows, heads, group;
  int width, v_width;

  int pack, row_tiles, splits, steps, pitch;  // by the plan

  void* out;   // [B, S, H, v_width]
  float* lse;  // [B, H, S], natural logarithm
  // Of each split, if there are several: normalised, logarithm to base 2. [splits, B, H, S, v_width].
  float *split_out, *split_lse;
  int64_t lse_rows;
};

// ---- lists of tokens ------------------------------------------------------------------------------------------------

struct ListParams {
  Integers tokens;  // [B, lists, size]
  int64_t batch_stride, list_stride, stride;
  int lists, size, total;
  int *ordered, *counts;
  uint32_t* bits;  // [B, lists, words], touched only for lists that are not in order
  int words;

  __device__ int64_t at(int list, int i) const {
    return tokens.at(list / lists * batch_stride + list % lists * list_stride + i * stride);
  }
  __device__ bool valid(int64_t token) const { return token >= 0 && token < total; }
};

// Grid: one block per list. Ascending lists without repetitions, with what is no token behind them, are copied; others
// are put in order by the set of their tokens.
static __global__ void __launch_bounds__(kOrderThreads) order_tokens_kernel(const ListParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  int* const scratch = memory.take<int>(32, "scratch");
  const int list = int(blockIdx.x), thread = int(threadIdx.x);
  int* const ordered = p.ordered + int64_t(list) * p.size;
  int own = 0, count;
  bool in_order = true;
  for (int i = thread; i < p.size; i += kOrderThreads) {
    const int64_t token = p.at(list, i), before = i > 0 ? p.at(list, i - 1) : -1;
    if (!p.valid(token)) continue;
    ordered[i] = int(token), ++own;
    if (i > 0) in_order = in_order && before >= 0 && before < token;
  }
  block_exclusive_sum(own, scratch, count);
  if (!__syncthreads_or(!in_order)) {
    if (thread == 0) p.counts[list] = count;
    return;
  }
  uint32_t* const bits = p.bits + int64_t(list) * p.words;
  for (int w = thread; w < p.words; w += kOrderThreads) bits[w] = 0;
  __syncthreads();
  for (int i = thread; i < p.size; i += kOrderThreads) {
    const int64_t token = p.at(list, i);
    if (p.valid(token)) atomicOr(&bits[token / 32], 1u << (token % 32));
  }
  __syncthreads();
  int written = 0;
  for (int base = 0; base < p.words; base += kOrderThreads) {
    const int w = base + thread;
    uint32_t left = w < p.words ? __ldcg(bits + w) : 0;
    int total;
    int place = written + block_exclusive_sum(__popc(left), scratch, total);
    for (; left != 0; left &= left - 1) ordered[place++] = 32 * w + __ffs(int(left)) - 1;
    written += total;
  }
  if (thread == 0) p.counts[list] = written;
}

// ---- attention ------------------------------------------------------------------------------------------------------

// Where a lane's key of a tile is.
struct KeyPlace {
  int key;  // in the sequence, -1: none
  int page, token;
};

// Sends a warp's rows on their way to its tile, zeros where there is no key. Eight neighbouring lanes carry one row.
template <class T, int kKeys>
__device__ __forceinline__ void send_keys(unsigned char* tile, int pitch, int steps, const TokenHeads& heads, int head,
                                          int width, const KeyPlace& place) {
  constexpr int kElements = 16 / int(sizeof(T));
  const T* const data = heads.head<T>(0, head);
#pragma unroll(sizeof(T) == 4 ? 1 : 2)  // plain arithmetic leaves few registers
  for (int j = 0; j < kKeys / 4; ++j) {
    const int i = 4 * j + lane_index() / 8;
    const int key = __shfl_sync(kFullWarp, place.key, i), page = __shfl_sync(kFullWarp, place.page, i);
    const int token = __shfl_sync(kFullWarp, place.token, i);
    const T* const row = data + page * heads.batch_stride + token * heads.token_stride;
#pragma unroll(sizeof(T) == 4 ? 1 : 2)
    for (int chunk = lane_index() % 8; chunk < 2 * steps; chunk += 8) {
      const bool valid = key >= 0 && chunk * kElements < width;
      ptx::cp_async_16(tile + i * pitch + chunk * 16, valid ? row + chunk * kElements : data, valid);
    }
  }
}

// Four neighbours of a result, from `at` on.
template <class T>
__device__ __forceinline__ void put_four(void* out, int64_t at, const Pack<float, 4>& x) {
  Pack<T, 4> four;
#pragma unroll
  for (int j = 0; j < 4; ++j) narrow(x.at[j], four.at[j]);
  *reinterpret_cast<Pack<T, 4>*>(static_cast<T*>(out) + at) = four;
}

// What the warps of a block have summed up of their keys: side by side, then one after the other.
template <class T, int kWidth>
struct WarpSums {
  static constexpr int kPitch = decode_result_pitch(kWidth);
  float *partial, *peaks, *sums;  // partial: [warps, rows, kPitch]

  __device__ explicit WarpSums(SharedMemory& memory)
      : partial(memory.take<float>(kDecodeWarps * kDecodeRows * kPitch, "partial")),
        peaks(memory.take<float>(kDecodeWarps * kDecodeRows, "peaks")),
        sums(memory.take<float>(kDecodeWarps * kDecodeRows, "sums")) {}

  __device__ void hold(const OnlineSoftmax<1>& softmax, const float (&out)[1][kWidth / 8][4]) const {
    const int lane = lane_index();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_index() * kDecodeRows + 8 * half + lane / 4;
      if (lane % 4 == 0) peaks[row] = softmax.peak[0][half], sums[row] = softmax.sum[0][half];
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n)
        *reinterpret_cast<Pack<float, 2>*>(partial + row * kPitch +
                                           value_column<T>(n, 0)) = {{out[0][n][2 * half], out[0][n][2 * half + 1]}};
    }
  }

  // After a barrier: four neighbours of a row, normalised, and the logarithm of its normalizer to base 2.
  __device__ Pack<float, 4> merge(int row, int column, float& log_sum) const {
    float peak = -kUnbounded, sum = 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) peak = fmaxf(peak, peaks[w * kDecodeRows + row]);
    const float base = peak == -kUnbounded ? 0.0f : peak;
    Pack<float, 4> total{};
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      const float weight = exp2f(peaks[w * kDecodeRows + row] - base);
      sum += weight * sums[w * kDecodeRows + row];
      const auto part = *reinterpret_cast<const Pack<float, 4>*>(partial + (w * kDecodeRows + row) * kPitch + column);
#pragma unroll
      for (int j = 0; j < 4; ++j) total.at[j] += weight * part.at[j];
    }
    const float inverse = sum == 0 ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int j = 0; j < 4; ++j) total.at[j] *= inverse;
    log_sum = sum == 0 ? -kUnbounded : peak == kUnbounded ? kUnbounded : peak + log2f(sum);
    return total;
  }
};

// Row `at` of out, `index` of lse: four neighbours, as a split's part or as they are.
template <class T>
__device__ __forceinline__ void put_result(const DecodeParams& p, int split, int64_t at, int64_t index, int column,
                                           const Pack<float, 4>& total, float log_sum) {
  if (p.splits > 1) {
    if (column == 0) p.split_lse[split * p.lse_rows + index] = log_sum;
    if (column < p.v_width)
      *reinterpret_cast<Pack<float, 4>*>(p.split_out + (split * p.lse_rows + index) * p.v_width + column) = total;
  } else {
    if (column == 0) p.lse[index] = log_sum * kLn2;
    if (column < p.v_width) put_four<T>(p.out, at * p.v_width + column, total);
  }
}

constexpr int decode_blocks(int width, size_t element_size) { return width * int(element_size) <= 256 ? 3 : 2; }

// Grid: blocks of 16 rows of query heads that share keys, in batches; splits.
template <class T, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, decode_blocks(kWidth, sizeof(T)))
    decode_kernel(const DecodeParams p) {
  constexpr int kKeys = decode_keys(kWidth, sizeof(T)), kColumns = kKeys / 8, kStep = kDecodeWarps * kKeys;
  constexpr int kValuePitch = tile_pitch(kWidth, sizeof(T)), kValueColumns = kWidth / 8;
  const int lane = lane_index(), warp = warp_index(), split = int(blockIdx.y);
  const int first_row = int(blockIdx.x) % p.row_tiles * kDecodeRows, head_blocks = p.heads / p.pack;
  const int first_head = int(blockIdx.x) / p.row_tiles % head_blocks * p.pack, kv_head = first_head / p.group;
  const int64_t b = int(blockIdx.x) / p.row_tiles / head_blocks;
  const int row_count = min(p.rows * p.pack - first_row, kDecodeRows);
  const auto query_of = [&](int row) { return (first_row + row) / p.pack; };
  const auto head_of = [&](int row) { return first_head + (first_row + row) % p.pack; };
  const auto lse_index = [&](int row) { return (b * p.heads + head_of(row)) * p.rows + query_of(row); };

  // Which keys.
  const int length = p.lengths.length(p.lengths_by_head ? b * (p.heads / p.group) + kv_head : b, p.total);
  const int64_t list = b * p.lists + int64_t(first_head) * p.lists / p.heads;
  const int* const tokens = p.tokens ? p.tokens + list * p.list_size : nullptr;
  const int count = tokens ? p.token_counts[list] : length, split_keys = decode_split_keys(count);
  const int begin = split * split_keys, end = min(count, begin + split_keys);
  if (begin >= end && p.splits > 1) {
    if (int(threadIdx.x) < row_count) p.split_lse[split * p.lse_rows + lse_index(int(threadIdx.x))] = -kUnbounded;
    return;
  }
  const auto locate = [&](int at) {
    KeyPlace place{-1, 0, 0};
    if (at + lane < end && lane < kKeys) {
      const int key = tokens ? tokens[at + lane] : at + lane;
      if (key < length) {
        place = {key, int(b), key};
        if (p.table.data) {
          // Tables come from the user: whatever they hold, no index leaves the arrays.
          place.page = int(p.table.at(b * p.table_batch_stride + key / p.page * p.table_stride));
          place.token = key % p.page;
          if (unsigned(place.page) >= unsigned(p.pages)) place.key = -1;
        }
      }
    }
    return place;
  };

  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  auto* const query_tile = memory.take<unsigned char>(kDecodeRows * p.pitch, "query_tile");
  auto* const key_tile = memory.take<unsigned char>(kStep * p.pitch, "key_tiles") + warp * kKeys * p.pitch;
  auto* const value_tile = memory.take<unsigned char>(kStep * kValuePitch, "value_tiles") + warp * kKeys * kValuePitch;
  const auto send = [&](const KeyPlace& place, bool values) {
    if (values) {
      send_keys<T, kKeys>(value_tile, kValuePitch, depth_steps(kWidth, sizeof(T)), p.v, kv_head, p.v_width, place);
    } else {
      send_keys<T, kKeys>(key_tile, p.pitch, p.steps, p.k, kv_head, p.width, place);
    }
  };
  const T* const q = p.q.head<T>(b, 0);
  send_rows(query_tile, p.pitch, kDecodeRows, p.width, p.steps, q, [&](int i) -> const T* {
    return i < row_count ? q + query_of(i) * p.q.token_stride + head_of(i) * p.q.head_stride : nullptr;
  });
  ptx::cp_async_commit();
  KeyPlace place = locate(begin + warp * kKeys);
  send(place, false);
  ptx::cp_async_commit();
  send(place, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait_groups<2>();
  __syncthreads();  // the queries are here

  OnlineSoftmax<1> softmax;
  softmax.reset();
  float out[1][kValueColumns][4] = {};
  for (int at = begin + warp * kKeys; at < end; at += kStep) {
    const KeyPlace next = locate(at + kStep);
    const bool more = at + kStep < end;
    ptx::cp_async_wait_groups<1>();
    __syncwarp();  // the keys are here
    float x[1][kColumns][4];
    multiply_rows<T>(query_tile, key_tile, p.pitch, p.steps, x);
    __syncwarp();  // nobody needs them any more
    if (more) send(next, false);
    ptx::cp_async_commit();

    scale_products(p.rule, x);
    // Only the newest keys of the sequence are hidden from any row.
    const bool gaps = p.table.data && __any_sync(kFullWarp, lane < kKeys && place.key < 0);
    if (tokens || p.bias.data || gaps || at + kKeys > length - p.rows + 1) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = __shfl_sync(kFullWarp, place.key, 8 * n + lane % 4 * 2 + j);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = 8 * half + lane / 4;
            float& logit = x[0][n][2 * half + j];
            if (key < 0 || key > length - p.rows + query_of(row)) {
              logit = -kUnbounded;
            } else if (p.bias.data && row < row_count) {
              logit += p.bias.head(b, head_of(row))[key * p.bias.token_stride] * p.rule.bias_scale;
            }
          }
        }
      }
    }
    float shrink[1][2];
    softmax.template advance<T>(x, shrink);
#pragma unroll
    for (int i = 0; i < kValueColumns * 4; ++i) out[0][i / 4][i % 4] *= shrink[0][i % 4 / 2];
    ptx::cp_async_wait_groups<1>();
    __syncwarp();  // the values are here
    add_values<T, kValuePitch>(x, value_tile, out);
    __syncwarp();  // nobody needs them any more
    if (more) send(next, true);
    ptx::cp_async_commit();
    place = next;
  }
  softmax.agree();
  ptx::cp_async_wait_all();
  __syncthreads();  // shared memory is about to be divided anew

  SharedMemory results(shared);
  const WarpSums<T, kWidth> warps(results);
  warps.hold(softmax, out);
  __syncthreads();
  constexpr int kParts = kWidth / 4;
  for (int i = int(threadIdx.x); i < row_count * kParts; i += kDecodeThreads) {
    const int row = i / kParts, column = i % kParts * 4;
    float log_sum;
    const Pack<float, 4> total = warps.merge(row, column, log_sum);
    const int64_t at = (b * p.rows + query_of(row)) * p.heads + head_of(row);
    put_result<T>(p, split, at, lse_index(row), column, total, log_sum);
  }
}

// Grid: a block per row of the result. Splits are shared out among the warps, in order; those without keys have written
// nothing but that they weigh nothing.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads) combine_splits_kernel(const DecodeParams p) {
  constexpr int kEach = 4;
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  float* const weights = memory.take<float>(kMostDecodeSplits, "weights");
  auto* const parts = memory.take<Pack<float, kEach>>(kDecodeThreads, "parts");
  const int64_t row = blockIdx.x;
  const int lane = lane_index(), warp = warp_index();
  float peak = -kUnbounded;
  for (int s = lane; s < p.splits; s += kWarpSize) peak = fmaxf(peak, p.split_lse[s * p.lse_rows + row]);
  for (int bit = 1; bit < kWarpSize; bit *= 2) peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, bit));
  const float base = peak == -kUnbounded ? 0.0f : peak;
  if (int(threadIdx.x) < p.splits) weights[threadIdx.x] = exp2f(p.split_lse[threadIdx.x * p.lse_rows + row] - base);
  __syncthreads();
  float sum = 0;
  for (int s = 0; s < p.splits; ++s) sum += weights[s];
  if (threadIdx.x == 0)
    p.lse[row] = sum == 0 ? -kUnbounded : peak == kUnbounded ? kUnbounded : (peak + log2f(sum)) * kLn2;
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum;

  // From [B, H, S] to [B, S, H].
  const int64_t query = row % p.rows, head = row / p.rows % p.heads, b = row / p.rows / p.heads;
  const int64_t to = ((b * p.rows + query) * p.heads + head) * p.v_width;
  const int each = (p.splits + kDecodeWarps - 1) / kDecodeWarps, last = min((warp + 1) * each, p.splits);
  for (int first = 0; first < p.v_width; first += kWarpSize * kEach) {
    const int column = first + lane * kEach;
    Pack<float, kEach> total{};
    if (column < p.v_width) {
#pragma unroll 4
      for (int s = warp * each; s < last; ++s) {
        if (weights[s] == 0) continue;
        const auto part =
            *reinterpret_cast<const Pack<float, kEach>*>(p.split_out + (s * p.lse_rows + row) * p.v_width + column);
#pragma unroll
        for (int j = 0; j < kEach; ++j) total.at[j] += weights[s] * part.at[j];
      }
    }
    __syncthreads();
    parts[threadIdx.x] = total;
    __syncthreads();
    if (warp == 0 && column < p.v_width) {
      for (int w = 1; w < kDecodeWarps; ++w) {
        const auto part = parts[w * kWarpSize + lane];
#pragma unroll
        for (int j = 0; j < kEach; ++j) total.at[j] += part.at[j];
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j) total.at[j] *= inverse;
      put_four<T>(p.out, to + column, total);
    }
  }
}

}  // namespace fastok::cuda
