// density_peaks on CUDA. Tiles of squared distances in fp32 (match/nearest_kernel.cuh) rule out pairs; what remains is
// measured by a warp in the order that all backends add in, so that picks are the same everywhere. Torch-free.
#pragma once
#include "match/nearest_kernel.cuh"

namespace fastok::cuda {

struct PeaksParams {
  const void* x;
  int64_t batch_stride, row_stride;
  int n, width, neighbors, row_tiles;

  // Working memory.
  float* value;         // [B, N, neighbors], negated squared distances, nearest first
  int64_t* index;       // [B, N, neighbors], -1 where there are fewer
  double* spread;       // [B, N], mean squared distance to the neighbours: the lower, the denser
  int64_t* peaks;       // [B, N], tokens without a denser one among their neighbours, in any order
  int32_t* peak_count;  // [B]
  float* score;         // [B, N], the result: log(density * distance)

  template <class T>
  __device__ RowList<T> points(int64_t b) const {
    return {{nullptr, 0, 1, n}, static_cast<const T*>(x) + b * batch_stride, row_stride};
  }
  // More than what fp32 may err by in either order of the sum, as a share of it.
  __device__ float share() const { return float(width + 8) * 0x1p-22f; }
};

// ---- exact distances ------------------------------------------------------------------------------------------------

// Squared distance of two rows by a warp: 16 interleaved sums without fused additions, then added in pairs. Both halves
// of the warp do the same.
template <class T>
__device__ float squared_distance(const T* x, const T* y, int width) {
  float sum = 0;
  for (int d = lane_index() % 16; d < width; d += 16) {
    const float difference = __fsub_rn(widen(x[d]), widen(y[d]));
    sum = __fadd_rn(sum, __fmul_rn(difference, difference));
  }
  for (int half = 8; half > 0; half /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, half));
  return sum;
}

// Tiles of one block's rows with all tokens: calls consume(row, column, negated distance, whether there is such a
// column) for each of the warp's rows and 32 columns at a time, ascending.
template <class T, class Consume>
__device__ void sweep_tiles(const RowList<T>& rows, int row_begin, const RowList<T>& columns, int width,
                            SharedMemory& memory, const Consume& consume) {
  float* const row_slice = memory.take<float>(kListDepth * kListPitch, "row_slice");
  float* const column_slice = memory.take<float>(kListDepth * kListPitch, "column_slice");
  float* const distances = memory.take<float>(kListRows * kListPitch, "distances");
  float* const ones = memory.take<float>(kListRows, "ones");
  constexpr int kRowsPerWarp = kListRows / (kListThreads / kWarpSize);
  if (int(threadIdx.x) < kListRows) ones[threadIdx.x] = 1;

  for (int begin = 0; begin < columns.tokens.count; begin += kTileColumns) {
    compare_tiles(rows, row_begin, columns, begin, width, Similarity::euclidean, ones, ones, row_slice, column_slice,
                  distances);
    __syncthreads();
    for (int j = 0; j < kRowsPerWarp; ++j) {
      const int row = warp_index() * kRowsPerWarp + j;
      if (row_begin + row >= rows.tokens.count) break;
      for (int half = 0; half < kTileColumns; half += kWarpSize) {
        const int column = begin + half + lane_index();
        consume(j, row_begin + row, column, distances[row * kListPitch + half + lane_index()],
                column < columns.tokens.count);
      }
    }
  }
}

inline constexpr size_t peaks_bytes() {
  return 2 * shared_bytes<float>(kListDepth * kListPitch) + shared_bytes<float>(kListRows * kListPitch) +
         shared_bytes<float>(kListRows);
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// Grid: row_tiles blocks of kListRows tokens per sample. The nearest neighbours of each.
template <class T>
__global__ void __launch_bounds__(kListThreads, 3) neighbors_kernel(const PeaksParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const int64_t b = blockIdx.x / unsigned(p.row_tiles);
  const int row_begin = int(blockIdx.x % unsigned(p.row_tiles)) * kListRows, k = p.neighbors;
  const RowList<T> points = p.points<T>(b);
  constexpr int kRowsPerWarp = kListRows / (kListThreads / kWarpSize);
  for (int j = 0; j < kRowsPerWarp; ++j) {
    const int64_t i = row_begin + warp_index() * kRowsPerWarp + j;
    for (int e = lane_index(); i < p.n && e < k; e += kWarpSize) {
      p.value[(b * p.n + i) * k + e] = -kInfinity;
      p.index[(b * p.n + i) * k + e] = -1;
    }
  }
  __syncwarp();

  const float bound = 1.0f - p.share();
  sweep_tiles(points, row_begin, points, p.width, memory, [&](int, int i, int column, float score, bool inside) {
    float* const value = p.value + (b * p.n + i) * k;
    int64_t* const index = p.index + (b * p.n + i) * k;
    unsigned near = __ballot_sync(kFullWarp, inside && score * bound > value[k - 1]);
    for (; near != 0; near &= near - 1) {
      const int source = __ffs(int(near)) - 1, j = __shfl_sync(kFullWarp, column, source);
      if (!(__shfl_sync(kFullWarp, score, source) * bound > value[k - 1])) continue;
      const float exact = -squared_distance(points.row(i), points.row(j), p.width);
      if (exact > value[k - 1]) insert(value, index, k, exact, j);
      __syncwarp();
    }
  });
}

// Grid: covers B * N tokens.
__global__ void __launch_bounds__(256) spread_kernel(const PeaksParams p, int64_t tokens) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= tokens) return;
  double sum = 0;
  int count = 0;
  for (; count < p.neighbors && p.index[i * p.neighbors + count] >= 0; ++count)
    sum += double(-p.value[i * p.neighbors + count]);
  p.spread[i] = count > 0 ? sum / double(int64_t(count) * max(p.width, 1)) : double(kInfinity);
}

__device__ inline bool is_denser(const double* spread, int64_t i, int64_t than) {
  return spread[i] < spread[than] || (spread[i] == spread[than] && i < than);
}

__device__ inline float peak_score(double squared_distance, double spread) {
  return float(log(squared_distance) / 2 - spread);
}

// Grid: covers B * N tokens. Scores those that have a denser token among their neighbours; lists the others.
__global__ void __launch_bounds__(256) separate_kernel(const PeaksParams p, int64_t tokens) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= tokens) return;
  const int64_t b = i / p.n, begin = b * p.n;
  const float* const value = p.value + i * p.neighbors;
  const int64_t* const index = p.index + i * p.neighbors;
  if (index[0] < 0) {  // not finite
    p.score[i] = kNoNumber;
    return;
  }
  for (int e = 0; e < p.neighbors && index[e] >= 0; ++e) {
    if (!is_denser(p.spread + begin, index[e], i - begin)) continue;
    p.score[i] = peak_score(double(-value[e]), p.spread[i]);
    return;
  }
  p.peaks[begin + atomicAdd(&p.peak_count[b], 1)] = i - begin;
}

// Grid: row_tiles blocks of kListRows listed tokens per sample, of which some have none. Of each listed token, the
// nearest denser one; without any, the farthest.
template <class T>
__global__ void __launch_bounds__(kListThreads, 2) peaks_kernel(const PeaksParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const int64_t b = blockIdx.x / unsigned(p.row_tiles);
  const int row_begin = int(blockIdx.x % unsigned(p.row_tiles)) * kListRows;
  const int count = p.peak_count[b];
  if (row_begin >= count) return;
  const RowList<T> points = p.points<T>(b);
  const int64_t* const list = p.peaks + b * p.n;
  RowList<T> peaks = p.points<T>(b);
  peaks.tokens = {list, 0, 1, count};
  const double* const spread = p.spread + b * p.n;
  constexpr int kRowsPerWarp = kListRows / (kListThreads / kWarpSize);

  // Lane j keeps what is known of the warp's row j.
  float nearest = kInfinity, farthest = 0;
  const float share = p.share();
  sweep_tiles(peaks, row_begin, points, p.width, memory, [&](int j, int row, int column, float score, bool inside) {
    const int token = int(list[row]);
    const bool denser = inside && is_denser(spread, column, token);
    const float low = -score * (1.0f - share), high = -score * (1.0f + share);
    float near = __shfl_sync(kFullWarp, nearest, j), far = __shfl_sync(kFullWarp, farthest, j);
    unsigned candidates = __ballot_sync(kFullWarp, denser && low < near);
    const bool lonely = near == kInfinity && candidates == 0;
    if (lonely) candidates = __ballot_sync(kFullWarp, inside && high > far);
    for (; candidates != 0; candidates &= candidates - 1) {
      const int source = __ffs(int(candidates)) - 1;
      const float bound = __shfl_sync(kFullWarp, lonely ? high : low, source);
      if (lonely ? !(bound > far) : !(bound < near)) continue;
      const int other = __shfl_sync(kFullWarp, column, source);
      const float exact = squared_distance(points.row(token), points.row(other), p.width);
      if (lonely && exact < kInfinity) far = max(far, exact);
      if (!lonely) near = min(near, exact);
    }
    if (lane_index() == j) nearest = near, farthest = far;
  });
  const int row = row_begin + warp_index() * kRowsPerWarp + lane_index();
  if (lane_index() >= kRowsPerWarp || row >= count) return;
  const int64_t token = list[row];
  p.score[b * p.n + token] = peak_score(double(nearest < kInfinity ? nearest : farthest), spread[token]);
}

}  // namespace fastok::cuda
