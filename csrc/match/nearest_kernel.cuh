// nearest on CUDA: the best column alone comes from the tensor-core sweep of match_tile.cuh; lists of k, squared
// distances and fp32 dot products from nearest_list_kernel, in plain fp32 arithmetic. Torch-free.
#pragma once
#include "match/match_tile.cuh"

namespace fastok::cuda {

struct NearestParams {
  const void *x, *y;
  int64_t x_batch_stride, x_row_stride, y_batch_stride, y_row_stride;
  const bool* mask;  // nullptr: all columns may be chosen
  int64_t mask_batch_stride, mask_stride;
  int n, m, width, k;
  Similarity similarity;

  int row_tiles;
  SweepShape shape;

  float* value;    // [B, N, k]
  int64_t* index;  // [B, N, k]

  template <class T>
  __device__ RowList<T> rows(int64_t b) const {
    return {{nullptr, 0, 1, n}, static_cast<const T*>(x) + b * x_batch_stride, x_row_stride};
  }
  template <class T>
  __device__ RowList<T> columns(int64_t b) const {
    return {{nullptr, 0, 1, m}, static_cast<const T*>(y) + b * y_batch_stride, y_row_stride};
  }
  __device__ Candidates candidates(int64_t b) const {
    return {0, mask ? mask + b * mask_batch_stride : nullptr, mask_stride};
  }
};

// Grid: row_tiles blocks per sample. For k = 1.
template <class T, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, kWarps == 8 ? 2 : 3) nearest_tile_kernel(const NearestParams p) {
  FASTOK_SHARED(shared);
  const int64_t b = blockIdx.x / unsigned(p.row_tiles);
  const int row_begin = int(blockIdx.x % unsigned(p.row_tiles)) * kWarps * 16;
  Best best;
  find_best<T, kWarps>(p.rows<T>(b), row_begin, p.columns<T>(b), p.candidates(b), p.shape, shared, best);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row_begin + warp_index() * 16 + lane_index() / 4 + 8 * half;
    if (i >= p.n || lane_index() % 4 != 0) continue;
    p.value[b * p.n + i] = best.score[half];
    p.index[b * p.n + i] = best.column[half];
  }
}

// ---- lists ----------------------------------------------------------------------------------------------------------

// Scale and inverse norm of a row, found by a warp in two passes over it; 1 and 1 unless cosine.
struct RowFactors {
  float scale = 1, inverse = 1;
};

template <class T>
__device__ RowFactors measure_row(const T* row, int width, Similarity similarity) {
  RowFactors factors;
  if (similarity != Similarity::cosine) return factors;
  float peak = 0;
  for (int d = lane_index(); d < width; d += kWarpSize) peak = fmaxf(peak, fabsf(widen(row[d])));
  for (int bit = 1; bit < kWarpSize; bit *= 2) peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, bit));
  factors.scale = range_scale(peak);
  float squares = 0;
  for (int d = lane_index(); d < width; d += kWarpSize) {
    const float x = widen(row[d]) * factors.scale;
    squares += x * x;
  }
  for (int bit = 1; bit < kWarpSize; bit *= 2) squares += __shfl_xor_sync(kFullWarp, squares, bit);
  factors.inverse = inverse_norm(squares, factors.scale);
  return factors;
}

// Inserts (score, column) into a descending list of k that one warp owns. The list's last entry is known to be worse.
__device__ inline void insert(float* value, int64_t* index, int k, float score, int64_t column) {
  // Chunks of 32 entries move up one place, last chunk first; an entry's old neighbour is read before it is
  // overwritten.
  for (int begin = (k - 1) / kWarpSize * kWarpSize; begin >= 0; begin -= kWarpSize) {
    const int i = begin + lane_index();
    const bool inside = i < k;
    const float here = inside ? value[i] : -kInfinity;
    const float below = inside && i > 0 ? value[i - 1] : kInfinity;
    const int64_t below_index = inside && i > 0 ? index[i - 1] : 0;
    __syncwarp();
    if (inside && here < score) {
      const bool lands = !(below < score);  // equals came first and stay first
      value[i] = lands ? score : below;
      index[i] = lands ? column : below_index;
    }
    __syncwarp();
    if (__shfl_sync(kFullWarp, here, 0) >= score) break;  // all before this chunk is better
  }
}

// Rows [begin, begin + kListRows) of a depth slice, transposed to out[depth][row] as fp32 and scaled; zero outside.
template <class T>
__device__ void load_slice(const RowList<T>& rows, int begin, int depth, int width, const float* scale, float* out) {
  for (int item = int(threadIdx.x); item < kListRows * kListDepth; item += kListThreads) {
    const int row = item / kListDepth, d = item % kListDepth, i = begin + row;
    const bool inside = i < rows.tokens.count && depth + d < width;
    out[d * kListPitch + row] = inside ? widen(rows.row(rows.tokens.at(i))[depth + d]) * scale[row] : 0.0f;
  }
}

// Dot products, or negated squared distances, of kListRows rows with as many columns, kListPitch apart: each thread
// makes 4 x 4 of them. `row_slice` and `column_slice` hold kListDepth * kListPitch. Ends before the results are
// visible.
template <class T>
__device__ void compare_tiles(const RowList<T>& rows, int row_begin, const RowList<T>& columns, int column_begin,
                              int width, Similarity similarity, const float* row_scale, const float* column_scale,
                              float* row_slice, float* column_slice, float* out) {
  const int thread_row = int(threadIdx.x) / 16 * 4, thread_column = int(threadIdx.x) % 16 * 4;
  float acc[4][4] = {};
  for (int depth = 0; depth < width; depth += kListDepth) {
    __syncthreads();
    load_slice(rows, row_begin, depth, width, row_scale, row_slice);
    load_slice(columns, column_begin, depth, width, column_scale, column_slice);
    __syncthreads();
#pragma unroll 8
    for (int d = 0; d < kListDepth; ++d) {
      const auto r = *reinterpret_cast<const Pack<float, 4>*>(row_slice + d * kListPitch + thread_row);
      const auto c = *reinterpret_cast<const Pack<float, 4>*>(column_slice + d * kListPitch + thread_column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float difference = r.at[i] - c.at[j];
          acc[i][j] =
              similarity == Similarity::euclidean ? acc[i][j] - difference * difference : acc[i][j] + r.at[i] * c.at[j];
        }
      }
    }
  }
  __syncthreads();  // the scores of the tile before were read
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *reinterpret_cast<Pack<float, 4>*>(out + (thread_row + i) * kListPitch + thread_column) =
        Pack<float, 4>{{acc[i][0], acc[i][1], acc[i][2], acc[i][3]}};
}

// Grid: row_tiles blocks of kListRows rows per sample. Each thread makes 4 x 4 scores of a tile; then warps sort the
// tile's scores into the lists, which live in the results.
template <class T>
__global__ void __launch_bounds__(kListThreads) nearest_list_kernel(const NearestParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  float* const row_slice = memory.take<float>(kListDepth * kListPitch, "row_slice");
  float* const column_slice = memory.take<float>(kListDepth * kListPitch, "column_slice");
  float* const scores = memory.take<float>(kListRows * kListPitch, "scores");
  float* const row_scale = memory.take<float>(kListRows, "row_scale");
  float* const column_scale = memory.take<float>(kListRows, "column_scale");
  float* const column_factor = memory.take<float>(kListRows, "column_factor");

  const int64_t b = blockIdx.x / unsigned(p.row_tiles);
  const int row_begin = int(blockIdx.x % unsigned(p.row_tiles)) * kListRows;
  const RowList<T> rows = p.rows<T>(b), columns = p.columns<T>(b);
  const Candidates candidates = p.candidates(b);
  const int lane = lane_index(), warp = warp_index();
  constexpr int kWarps = kListThreads / kWarpSize, kRowsPerWarp = kListRows / kWarps;

  // Empty lists. A lane keeps the inverse norm of one of its warp's rows; scales are for all.
  float row_inverse = 1;
  for (int j = 0; j < kRowsPerWarp; ++j) {
    const int row = warp * kRowsPerWarp + j, i = row_begin + row;
    if (i >= p.n) break;
    const RowFactors factors = measure_row(rows.row(i), p.width, p.similarity);
    if (lane == 0) row_scale[row] = factors.scale;
    if (lane == j) row_inverse = factors.inverse;
    for (int e = lane; e < p.k; e += kWarpSize) {
      p.value[(b * p.n + i) * p.k + e] = -kInfinity;
      p.index[(b * p.n + i) * p.k + e] = -1;
    }
  }

  for (int begin = 0; begin < p.m; begin += kTileColumns) {
    // Column factors: a warp's lane j keeps the inverse norm of the warp's column j, NaN if that may not be chosen.
    float column_inverse = 1;
    for (int j = 0; j < kRowsPerWarp; ++j) {
      const int column = warp * kRowsPerWarp + j, i = begin + column;
      RowFactors factors{1.0f, kNoNumber};
      if (i < p.m && candidates.allow(columns.tokens, i)) factors = measure_row(columns.row(i), p.width, p.similarity);
      if (lane == 0) column_scale[column] = factors.scale;
      if (lane == j) column_inverse = factors.inverse;
    }

    // Row by row in shared memory.
    compare_tiles(rows, row_begin, columns, begin, p.width, p.similarity, row_scale, column_scale, row_slice,
                  column_slice, scores);
    if (lane < kRowsPerWarp) column_factor[warp * kRowsPerWarp + lane] = column_inverse;
    __syncthreads();

    // Into the lists, in ascending column order.
    for (int j = 0; j < kRowsPerWarp; ++j) {
      const int row = warp * kRowsPerWarp + j, i = row_begin + row;
      const float inverse = __shfl_sync(kFullWarp, row_inverse, j);
      if (i >= p.n) break;
      float* const value = p.value + (b * p.n + i) * p.k;
      int64_t* const index = p.index + (b * p.n + i) * p.k;
      for (int half = 0; half < kTileColumns; half += kWarpSize) {
        const int column = half + lane;
        const float score = scores[row * kListPitch + column] * inverse * column_factor[column];
        unsigned better = __ballot_sync(kFullWarp, score > value[p.k - 1]);
        for (; better != 0; better &= better - 1) {
          const int source = __ffs(int(better)) - 1;
          const float s = __shfl_sync(kFullWarp, score, source);
          if (s > value[p.k - 1]) insert(value, index, p.k, s, begin + half + source);
          __syncwarp();
        }
      }
    }
  }
}

}  // namespace fastok::cuda
