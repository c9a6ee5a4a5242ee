// k_center on CUDA: exact distances (reference/k_center.py has their definition), so that every plan picks the same.
// Either products_kernel makes the distances of all pairs and pick_kernel does all picks of a sample in one block, or a
// cluster of blocks does them (cluster_kernel.cuh), or step_kernel is launched once per pick and streams the tokens.
#pragma once
#include "common/exact.cuh"
#include "k_center/k_center_plan.h"
#include "ptx/rn.h"

namespace fastok::cuda {

enum class CenterStart { isolated, norm, given };

struct CenterParams {
  const void* x;
  int64_t batch_stride, row_stride;
  const bool* mask;  // nullptr: none
  int64_t mask_batch_stride, mask_stride;
  const int64_t* first;  // nullptr: the lowest token
  int64_t first_stride;
  int batch, n, width, k, token_blocks;
  bool cosine, max_sum;
  CenterStart start;

  // Of each token: its integers are round(x * scale), 0 if it is not finite; the integers' norm; its rank as a first
  // pick, -inf if it is not available; the bits of its distance to the nearest other one, where the start asks.
  float* scale;
  double *norm, *rank;
  int* isolation;
  float* gram;         // [batch][n][n], nullptr: none
  double* value;       // [batch][n], the objective between picks, nullptr: it stays in shared memory
  double* best_value;  // [2][batch][token_blocks], by turns: each block's best token and its value
  int* best_token;
  int64_t* index;
  float* distance;

  // Of one sample.
  template <class T>
  __device__ __forceinline__ ExactTokens tokens(int64_t b) const {
    return {static_cast<const T*>(x) + b * batch_stride, row_stride, scale + b * n, norm + b * n, nullptr, n, width};
  }
  __device__ bool masked(int64_t b, int j) const { return mask && !mask[b * mask_batch_stride + j * mask_stride]; }
};

constexpr double kNowhere = -double(INFINITY);

template <class T>
__device__ __forceinline__ const T* token_row(const CenterParams& p, int64_t b, int j) {
  return static_cast<const T*>(p.x) + b * p.batch_stride + j * p.row_stride;
}

__device__ __forceinline__ float cosine_distance(double product, double norm_a, double norm_b) {
  return 1.0f - exact_cosine(product, norm_a, norm_b);
}

// By a whole warp; exact sums for the cosine, the specification's order for the other.
template <class T>
__device__ float token_distance(const CenterParams& p, int64_t b, int i, int j) {
  const T *const a = token_row<T>(p, b, i), *const c = token_row<T>(p, b, j);
  const int64_t at = b * p.n;
  if (p.cosine) {
    const double product = exact_dot(a, p.scale[at + i], c, p.scale[at + j], p.width);
    return cosine_distance(product, p.norm[at + i], p.norm[at + j]);
  }
  double sum = 0;
  for (int d = lane_index(); d < p.width; d += kWarpSize) {
    const double difference = double(widen(a[d])) - double(widen(c[d]));
    sum = ptx::add_rn(sum, ptx::mul_rn(difference, difference));  // two roundings: never fused
  }
  return float(sqrt(warp_sum(sum)));
}

// ---- what is measured of a token ------------------------------------------------------------------------------------

// Grid: blocks of a warp per token of the whole batch.
template <class T>
__global__ void __launch_bounds__(kCenterThreads) measure_kernel(const CenterParams p) {
  const int64_t token = int64_t(blockIdx.x) * warps_in_block() + warp_index();
  if (token >= int64_t(p.batch) * p.n) return;
  const int64_t b = token / p.n;
  const int j = int(token % p.n);
  const MeasuredToken measured = measure_token(token_row<T>(p, b, j), p.width);
  if (lane_index() != 0) return;
  const bool available = measured.finite && !p.masked(b, j);
  const bool given = p.first && p.first[b * p.first_stride] == j;
  p.scale[token] = measured.scale;
  p.norm[token] = measured.norm;
  p.rank[token] = !available ? kNowhere : p.start == CenterStart::norm ? measured.length : double(given);
  if (p.isolation) p.isolation[token] = __float_as_int(INFINITY);
}

// ---- distances of all pairs -----------------------------------------------------------------------------------------

// Grid: (tiles of columns, tiles of rows, samples); tiles below the diagonal are the mirror of those above.
template <class T>
__global__ void __launch_bounds__(kProductThreads) products_kernel(const CenterParams p) {
  if (blockIdx.x < blockIdx.y) return;
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  double* const rows = memory.take<double>(kProductSlice, "rows");
  double* const columns = memory.take<double>(kProductSlice, "columns");
  const int first_row = int(blockIdx.y) * kProductTile, first_column = int(blockIdx.x) * kProductTile;
  const int y = int(threadIdx.x) / 16, x = int(threadIdx.x) % 16;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z) {
    const ExactTokens tokens = p.tokens<T>(b);
    double sum[4][4];
    multiply_tile<T>(tokens, first_row, tokens, first_column, rows, columns, sum);

    const int64_t at = b * p.n;
    const bool mirrored = blockIdx.x != blockIdx.y;
    float column_nearest[4] = {INFINITY, INFINITY, INFINITY, INFINITY};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + y + 16 * i;
      float row_nearest = INFINITY;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first_column + x + 16 * j;
        if (row >= p.n || column >= p.n) continue;
        const float distance = cosine_distance(sum[i][j], p.norm[at + row], p.norm[at + column]);
        if (p.gram) {
          p.gram[(at + row) * p.n + column] = distance;
          if (mirrored) p.gram[(at + column) * p.n + row] = distance;
        }
        if (row == column || p.rank[at + row] == kNowhere || p.rank[at + column] == kNowhere) continue;
        row_nearest = fminf(row_nearest, distance);
        column_nearest[j] = fminf(column_nearest[j], distance);
      }
      // Distances are not negative, so that their bits are in the same order.
      if (p.isolation && row_nearest < INFINITY) atomicMin(&p.isolation[at + row], __float_as_int(row_nearest));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (p.isolation && mirrored && column_nearest[j] < INFINITY)
        atomicMin(&p.isolation[at + first_column + x + 16 * j], __float_as_int(column_nearest[j]));
  }
}

// Each available token's distance to the nearest other one. Grid: blocks of a warp per token of the whole batch.
template <class T>
__global__ void __launch_bounds__(kCenterThreads) isolation_kernel(const CenterParams p) {
  const int64_t token = int64_t(blockIdx.x) * warps_in_block() + warp_index();
  if (token >= int64_t(p.batch) * p.n || p.rank[token] == kNowhere) return;
  const int64_t b = token / p.n;
  const int i = int(token % p.n);
  float nearest = INFINITY;
  for (int j = 0; j < p.n; ++j)
    if (j != i && p.rank[b * p.n + j] != kNowhere) nearest = fminf(nearest, token_distance<T>(p, b, i, j));
  if (lane_index() == 0) p.isolation[token] = __float_as_int(nearest);
}

// ---- picks ----------------------------------------------------------------------------------------------------------

struct BestToken {
  double value = kNowhere;
  int token = -1;

  // The lower index of equals; none (-1) is the highest.
  __device__ void offer(double v, int t) {
    if (v > value || (v == value && v > kNowhere && unsigned(t) < unsigned(token))) value = v, token = t;
  }
};

// The same in all lanes.
__device__ __forceinline__ BestToken warp_best(BestToken best) {
  for (int half = kWarpSize / 2; half > 0; half /= 2) {
    const double value = __shfl_xor_sync(kFullWarp, best.value, half);
    const int token = __shfl_xor_sync(kFullWarp, best.token, half);
    best.offer(value, token);
  }
  return best;
}

// The same in all threads of the block. `values` and `tokens` hold one entry per warp.
__device__ __forceinline__ BestToken block_best(BestToken best, double* values, int* tokens) {
  best = warp_best(best);
  __syncthreads();  // the previous call's readers are done
  if (lane_index() == 0) values[warp_index()] = best.value, tokens[warp_index()] = best.token;
  __syncthreads();
  if (lane_index() < warps_in_block()) best.offer(values[lane_index()], tokens[lane_index()]);
  return warp_best(best);
}

// What a token is worth as the first pick.
__device__ __forceinline__ double first_rank(const CenterParams& p, int64_t token) {
  const double rank = p.rank[token];
  return p.start == CenterStart::isolated && rank != kNowhere ? double(__int_as_float(p.isolation[token])) : rank;
}

__device__ __forceinline__ BestToken best_first(const CenterParams& p, int64_t b, double* values, int* tokens) {
  BestToken best;
  for (int j = int(threadIdx.x); j < p.n; j += int(blockDim.x)) best.offer(first_rank(p, b * p.n + j), j);
  return block_best(best, values, tokens);
}

// Writes one pick. If no finite token is left, finds the next of the others; called by all threads of one block.
__device__ __forceinline__ void write_pick(const CenterParams& p, int64_t b, int step, BestToken best, double* values,
                                           int* tokens) {
  const int64_t at = b * p.k + step;
  if (best.token >= 0) {
    const bool defined = step > 0 || p.start == CenterStart::isolated;
    if (threadIdx.x == 0) p.index[at] = best.token, p.distance[at] = defined ? float(best.value) : float(INFINITY);
    return;
  }
  // These are picked in ascending order: the next is after the last pick, if that was one of them.
  __syncthreads();
  const int64_t last = step > 0 ? p.index[at - 1] : -1;
  const int begin = last >= 0 && p.scale[b * p.n + last] == 0 ? int(last) + 1 : last < 0 && step > 0 ? p.n : 0;
  BestToken next;
  for (int j = begin + int(threadIdx.x); j < p.n; j += int(blockDim.x))
    if (p.scale[b * p.n + j] == 0 && !p.masked(b, j)) next.offer(0.0, j);
  next = block_best(next, values, tokens);
  if (threadIdx.x == 0) {
    p.index[at] = next.token;
    p.distance[at] = next.token < 0 ? -float(INFINITY) : float(NAN);
  }
}

__device__ __forceinline__ double updated(const CenterParams& p, int step, double value, float distance) {
  if (p.max_sum) return step == 0 ? double(distance) : value + double(distance);
  return step == 0 ? double(distance) : fmin(value, double(distance));
}

// All picks of a sample, from the distances of all pairs. Grid: a block per sample.
__global__ void __launch_bounds__(kPickThreads, 1) pick_kernel(const CenterParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  double* const values = memory.take<double>(32, "values");
  int* const tokens = memory.take<int>(32, "tokens");
  double* const objective = memory.take<double>(p.n, "objective");
  const int64_t b = blockIdx.x;
  BestToken best = best_first(p, b, values, tokens);
  for (int j = int(threadIdx.x); j < p.n; j += int(blockDim.x)) objective[j] = p.rank[b * p.n + j];
  for (int step = 0; step < p.k; ++step) {
    write_pick(p, b, step, best, values, tokens);
    if (best.token < 0) continue;
    const float* const distance = p.gram + (b * p.n + best.token) * p.n;
    BestToken next;
    for (int j = int(threadIdx.x); j < p.n; j += int(blockDim.x)) {
      const bool gone = j == best.token || objective[j] == kNowhere;
      objective[j] = gone ? kNowhere : updated(p, step, objective[j], distance[j]);
      next.offer(objective[j], j);
    }
    best = block_best(next, values, tokens);
  }
}

// One pick, known from what the launch before left, and what it changes. Grid: (token_blocks, samples).
template <class T>
__global__ void __launch_bounds__(kCenterThreads) step_kernel(const CenterParams p, int step) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  double* const values = memory.take<double>(32, "values");
  int* const tokens = memory.take<int>(32, "tokens");
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    BestToken best;
    if (step == 0) {
      best = best_first(p, b, values, tokens);
    } else {
      const int64_t before = (int64_t(step - 1) % 2 * p.batch + b) * p.token_blocks;
      for (int i = int(threadIdx.x); i < p.token_blocks; i += int(blockDim.x))
        best.offer(p.best_value[before + i], p.best_token[before + i]);
      best = block_best(best, values, tokens);
    }
    if (blockIdx.x == 0) write_pick(p, b, step, best, values, tokens);
    if (step + 1 == p.k) continue;
    BestToken next;
    const int warps = p.token_blocks * warps_in_block();
    for (int j = int(blockIdx.x) * warps_in_block() + warp_index(); j < p.n; j += warps) {
      double value = step == 0 ? p.rank[b * p.n + j] : p.value[b * p.n + j];
      if (best.token < 0 || j == best.token || value == kNowhere) {
        value = kNowhere;
      } else {
        value = updated(p, step, value, token_distance<T>(p, b, best.token, j));
      }
      __syncwarp();
      if (lane_index() == 0) p.value[b * p.n + j] = value;
      next.offer(value, j);
    }
    next = block_best(next, values, tokens);
    const int64_t now = (int64_t(step) % 2 * p.batch + b) * p.token_blocks;
    if (threadIdx.x == 0) p.best_value[now + blockIdx.x] = next.value, p.best_token[now + blockIdx.x] = next.token;
  }
}

}  // namespace fastok::cuda
