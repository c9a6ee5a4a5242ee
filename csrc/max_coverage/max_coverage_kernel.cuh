// max_coverage on CUDA: exact sums (reference/max_coverage.py has their definition), so that picks and gains are the
// same bits as on every backend. Two launches per pick: one finds it, covers with it and evaluates the runner-up, the
// other evaluates again the tokens that this leaves in question. Torch-free.
#pragma once
#include "common/exact.cuh"
#include "max_coverage/max_coverage_plan.h"

namespace fastok::cuda {

struct CoverageParams {
  bool pair;  // similarities are of tokens y to tokens x, not a matrix [B,R,N] given
  const void* matrix;
  int64_t matrix_batch_stride, matrix_row_stride, matrix_stride;
  const void *y, *x;
  int64_t y_batch_stride, y_row_stride, x_batch_stride, x_row_stride;
  const float* modular;  // [B,N], nullptr: none
  int64_t modular_batch_stride, modular_stride;
  int batch, rows, n, width, k;
  CoveragePlan plan;

  // Of tokens: their integers are round(token * scale); the integers' norm, NaN of a token that is not finite.
  float *y_scale, *x_scale;
  double *y_norm, *x_norm;
  float* kept;             // [B,R,N], the similarities of a pair, if planned
  int* peak;               // [B], the bits of the largest finite similarity, at least 0
  double* covered;         // [B,R], counted
  uint64_t* rank;          // [2][B,N], by turns: every token's gain as far as it is known, see rank_of
  int* runner_up;          // [B], the token with the second rank, -1 if there is none
  double* runner_up_gain;  // [B, row_blocks], its gain from each block's rows, counted
  int64_t* index;
  float* gain;

  template <class T>
  __device__ __forceinline__ ExactTokens rows_of(int64_t b) const {
    return {static_cast<const T*>(y) + b * y_batch_stride,
            y_row_stride,
            y_scale + b * rows,
            y_norm + b * rows,
            nullptr,
            rows,
            width};
  }
  template <class T>
  __device__ __forceinline__ ExactTokens columns_of(int64_t b) const {
    return {static_cast<const T*>(x) + b * x_batch_stride,
            x_row_stride,
            x_scale + b * n,
            x_norm + b * n,
            nullptr,
            n,
            width};
  }
  __device__ __forceinline__ uint64_t* ranks(int64_t b, int step) const {
    return rank + (int64_t(step % 2) * batch + b) * n;
  }
};

// ---- counting -------------------------------------------------------------------------------------------------------

struct Counter {
  double unit, size;  // similarities are counted in 1 / unit = size

  __device__ __forceinline__ Counter(const CoverageParams& p, int64_t b) {
    const int exponent = coverage_exponent(p.rows, exponent_of(double(__int_as_float(p.peak[b]))));
    unit = scalbn(1.0, exponent), size = scalbn(1.0, -exponent);
  }
  __device__ __forceinline__ double counted(float similarity) const { return rint(double(similarity) * unit); }
  // What a gain counted is worth, with the token's modular term; -inf stays that, whatever is gained.
  __device__ __forceinline__ double total(const CoverageParams& p, int64_t b, int j, double counted_gain) const {
    const double gained = counted_gain * size;
    if (!p.modular) return gained;
    const float modular = p.modular[b * p.modular_batch_stride + j * p.modular_stride];
    return modular == -float(INFINITY) && !isnan(gained) ? -double(INFINITY) : gained + double(modular);
  }
};

// What a similarity adds to what is covered: nothing where it is at most that, NaN where it is.
__device__ __forceinline__ double excess(double counted, double covered) {
  return counted <= covered ? 0.0 : counted - covered;
}

// Gains in their order, as integers: a token picked has the lowest, then come those whose gain is NaN.
constexpr uint64_t kPickedRank = 0, kNaNRank = 1;

__device__ __forceinline__ uint64_t rank_of(double gain) {
  if (isnan(gain)) return kNaNRank;
  const auto bits = uint64_t(__double_as_longlong(gain));
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}
__device__ __forceinline__ float gain_of(uint64_t rank) {
  if (rank == kNaNRank) return float(NAN);
  return float(__longlong_as_double(int64_t(rank >> 63 ? rank ^ uint64_t(1) << 63 : ~rank)));
}

// ---- similarities ---------------------------------------------------------------------------------------------------

// A similarity matrix in memory.
template <class T>
struct MatrixSource {
  static constexpr int kLanes = 1;  // threads that find a similarity
  const T* data;
  int64_t row_stride, stride;

  __device__ __forceinline__ MatrixSource(const CoverageParams& p, int64_t b)
      : data(static_cast<const T*>(p.matrix) + b * p.matrix_batch_stride),
        row_stride(p.matrix_row_stride),
        stride(p.matrix_stride) {}
  __device__ __forceinline__ float at(int r, int j) const { return widen(data[r * row_stride + j * stride]); }
};

// A pair's similarities, computed when they are asked for.
template <class T>
struct PairSource {
  static constexpr int kLanes = kWarpSize;
  ExactTokens y, x;

  __device__ __forceinline__ PairSource(const CoverageParams& p, int64_t b)
      : y(p.rows_of<T>(b)), x(p.columns_of<T>(b)) {}
  __device__ __forceinline__ float at(int r, int j) const {
    const double product = exact_dot(y.row<T>(r), y.scale[r], x.row<T>(j), x.scale[j], x.width);
    return exact_cosine(product, y.norm[r], x.norm[j]);
  }
};

// The larger of `top` and a similarity that is finite.
__device__ __forceinline__ float finite_peak(float top, float similarity) {
  return similarity > top && similarity < float(INFINITY) ? similarity : top;
}

// By a whole warp. The bits of numbers that are not negative are in the same order.
__device__ __forceinline__ void raise_peak(const CoverageParams& p, int64_t b, float top) {
  const int bits = __reduce_max_sync(kFullWarp, __float_as_int(top));
  if (lane_index() == 0 && bits > 0) atomicMax(&p.peak[b], bits);
}

// Grid: blocks of a warp per token of the whole batch.
template <class T>
__global__ void __launch_bounds__(kCoverageThreads, 2)
    coverage_measure_kernel(const T* x, int64_t batch_stride, int64_t row_stride, int batch, int count, int width,
                            float* scale, double* norm) {
  const int64_t token = int64_t(blockIdx.x) * warps_in_block() + warp_index();
  if (token >= int64_t(batch) * count) return;
  const MeasuredToken measured = measure_token(x + token / count * batch_stride + token % count * row_stride, width);
  if (lane_index() != 0) return;
  scale[token] = measured.scale;
  norm[token] = measured.finite ? measured.norm : double(NAN);
}

// Grid: (blocks, samples).
template <class T>
__global__ void __launch_bounds__(kCoverageThreads) peak_kernel(const CoverageParams p) {
  const int64_t numbers = int64_t(p.rows) * p.n;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const MatrixSource<T> source(p, b);
    float top = 0;
    for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < numbers; e += int64_t(gridDim.x) * blockDim.x)
      top = finite_peak(top, source.at(int(e / p.n), int(e % p.n)));
    raise_peak(p, b, top);
  }
}

// Calls consume(row, j, similarity) for each of a pair's similarities to kProductTile columns, of the thread's columns
// x + 16 j, in every `tiles`-th tile of rows. `slices` are two of kProductSlice numbers.
template <class T, class Consume>
__device__ __forceinline__ void for_similarities(const ExactTokens& rows, const ExactTokens& columns, int first_column,
                                                 int tile, int tiles, double* slices, const Consume& consume) {
  const int y = int(threadIdx.x) / 16, x = int(threadIdx.x) % 16;
  for (int first_row = tile * kProductTile; first_row < rows.count; first_row += tiles * kProductTile) {
    double sum[4][4];
    multiply_tile<T>(rows, first_row, columns, first_column, slices, slices + kProductSlice, sum);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first_column + x + 16 * j;
      if (column >= columns.count) continue;
      const double norm = columns.norm[columns.token(column)];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row + y + 16 * i;
        if (row < rows.count) consume(row, j, exact_cosine(sum[i][j], rows.norm[row], norm));
      }
    }
  }
}

// Of a pair, all similarities. Grid: (tiles of columns, tiles of rows, samples).
template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) similarities_kernel(const CoverageParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  double* const slices = memory.take<double>(2 * kProductSlice, "slices");
  const int first_column = int(blockIdx.x) * kProductTile, x = int(threadIdx.x) % 16;
  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z) {
    float top = 0;
    for_similarities<T>(p.rows_of<T>(b), p.columns_of<T>(b), first_column, int(blockIdx.y), int(gridDim.y), slices,
                        [&](int row, int j, float similarity) {
                          top = finite_peak(top, similarity);
                          if (p.plan.kept) p.kept[(b * p.rows + row) * p.n + first_column + x + 16 * j] = similarity;
                        });
    raise_peak(p, b, top);
  }
}

// ---- picks ----------------------------------------------------------------------------------------------------------

struct Ranked {
  uint64_t rank = kPickedRank;
  int token = -1;

  // The lower index of equals.
  __device__ __forceinline__ bool loses_to(const Ranked& other) const {
    return other.rank > rank || (other.rank == rank && rank > kPickedRank && other.token < token);
  }
};

// The same in all threads of the block. `ranks` and `tokens` hold one entry per warp.
__device__ __forceinline__ Ranked block_best(Ranked best, uint64_t* ranks, int* tokens) {
  for (int half = kWarpSize / 2; half > 0; half /= 2) {
    const Ranked other{__shfl_xor_sync(kFullWarp, best.rank, half), __shfl_xor_sync(kFullWarp, best.token, half)};
    if (best.loses_to(other)) best = other;
  }
  __syncthreads();  // the previous call's readers are done
  if (lane_index() == 0) ranks[warp_index()] = best.rank, tokens[warp_index()] = best.token;
  __syncthreads();
#pragma unroll 1  // more would only take registers
  for (int warp = 0; warp < warps_in_block(); ++warp) {
    const Ranked other{ranks[warp], tokens[warp]};
    if (best.loses_to(other)) best = other;
  }
  return best;
}

// Pick number `step`, what it covers, and the gain that this leaves the runner-up. Grid: (row_blocks, samples).
template <class Source>
__global__ void __launch_bounds__(kCoverageThreads, 2) cover_kernel(const CoverageParams p, int step) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  uint64_t* const ranks = memory.take<uint64_t>(kCoverageThreads / kWarpSize, "ranks");
  int* const tokens = memory.take<int>(kCoverageThreads / kWarpSize, "tokens");
  double* const gains = memory.take<double>(kCoverageThreads / kWarpSize, "gains");
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const uint64_t* const rank = p.ranks(b, step);
    Ranked first, second;
    for (int j = int(threadIdx.x); j < p.n; j += int(blockDim.x)) {
      const Ranked own{rank[j], j};
      if (first.loses_to(own)) {
        second = first, first = own;
      } else if (second.loses_to(own)) {
        second = own;
      }
    }
    const Ranked best = block_best(first, ranks, tokens);
    second = block_best(first.token == best.token ? second : first, ranks, tokens);
    const bool evaluated = second.rank > kNaNRank;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      p.index[b * p.k + step] = best.token;
      p.gain[b * p.k + step] = gain_of(best.rank);
      p.runner_up[b] = evaluated ? second.token : -1;
    }
    if (step + 1 == p.k) continue;

    const Source source(p, b);
    const Counter counter(p, b);
    const int workers = int(blockDim.x) / Source::kLanes;
    const int worker = int(threadIdx.x) / Source::kLanes;
    const bool writes = int(threadIdx.x) % Source::kLanes == 0;
    double gained = 0;
    for (int r = int(blockIdx.x) * workers + worker; r < p.rows; r += p.plan.row_blocks * workers) {
      double* const covered = p.covered + b * p.rows + r;
      const double before = step == 0 ? 0.0 : *covered, picked = counter.counted(source.at(r, best.token));
      const double now = picked > before ? picked : before;
      const double added = evaluated ? excess(counter.counted(source.at(r, second.token)), now) : 0.0;
      if constexpr (Source::kLanes > 1) __syncwarp();  // all have read what one of them writes
      if (writes) *covered = now, gained += added;
    }
    gained = warp_sum(gained);
    __syncthreads();
    if (lane_index() == 0) gains[warp_index()] = gained;
    __syncthreads();
    if (threadIdx.x != 0) continue;
    double sum = 0;
    for (int warp = 0; warp < warps_in_block(); ++warp) sum += gains[warp];
    p.runner_up_gain[b * p.plan.row_blocks + blockIdx.x] = sum;
  }
}

// ---- gains ----------------------------------------------------------------------------------------------------------

// The tokens that gain number `step` is to be known of, in ascending order, and of these the block's own `room`: to
// `list`, their number is the result. A gain never grows: tokens whose last one is less than the runner-up's are not
// picked. Carries over what is known of the block's share of the others. `counts` has one entry per warp.
__device__ __forceinline__ int list_in_question(const CoverageParams& p, int64_t b, int step, int room, int* list,
                                                int* counts) {
  const int first = int(blockIdx.x) * room, own_end = min(first + room, p.n);
  if (step == 0) {
    for (int j = first + int(threadIdx.x); j < own_end; j += int(blockDim.x)) list[j - first] = j;
    __syncthreads();
    return own_end - first;
  }
  const uint64_t* const known = p.ranks(b, step - 1);
  uint64_t* const next = p.ranks(b, step);
  const int pick = int(p.index[b * p.k + step - 1]), runner_up = p.runner_up[b];
  double counted = 0;
  for (int i = lane_index(); i < p.plan.row_blocks; i += kWarpSize)
    counted += p.runner_up_gain[b * p.plan.row_blocks + i];
  counted = warp_sum(counted);
  const uint64_t bar = runner_up < 0 ? kNaNRank + 1 : rank_of(Counter(p, b).total(p, b, runner_up, counted));

  int before = 0;
  for (int begin = 0; begin < p.n; begin += int(blockDim.x)) {
    const int j = begin + int(threadIdx.x);
    const uint64_t rank = j >= p.n || j == pick ? kPickedRank : known[j];
    const bool asked = rank > kNaNRank && rank >= bar;
    if (j >= first && j < own_end && !asked) next[j] = rank;
    int total;
    const int place = before + block_exclusive_sum<int>(asked, counts, total) - first;
    if (asked && place >= 0 && place < room) list[place] = j;
    before += total;
    if (before >= first + room && begin + int(blockDim.x) >= own_end) break;
  }
  __syncthreads();
  return max(0, min(before - first, room));
}

// From a matrix. Grid: (tiles of kGainColumns, samples).
template <class T>
__global__ void __launch_bounds__(kMostGainThreads, 1) gain_kernel(const CoverageParams p, int step) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  int* const list = memory.take<int>(kGainColumns, "list");
  int* const counts = memory.take<int>(kMostGainThreads / kWarpSize, "counts");
  double* const gains = memory.take<double>(kMostGainThreads, "gains");
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    __syncthreads();
    const int count = list_in_question(p, b, step, kGainColumns, list, counts);
    if (count == 0) continue;
    const MatrixSource<T> source(p, b);
    const Counter counter(p, b);
    const int j = list[min(lane_index(), count - 1)];
    const double* const covered = p.covered + b * p.rows;
    double sum = 0;
#pragma unroll 4
    for (int r = warp_index(); r < p.rows; r += warps_in_block())
      sum += excess(counter.counted(source.at(r, j)), step == 0 ? 0.0 : covered[r]);
    gains[threadIdx.x] = sum;
    __syncthreads();
    if (int(threadIdx.x) >= count) continue;
    for (int warp = 1; warp < warps_in_block(); ++warp) sum += gains[warp * kWarpSize + lane_index()];
    p.ranks(b, step)[j] = rank_of(counter.total(p, b, j, sum));
  }
}

// From a pair whose similarities are not kept. Grid: (tiles of kProductTile columns, samples).
template <class T>
__global__ void __launch_bounds__(kProductThreads, 2) pair_gain_kernel(const CoverageParams p, int step) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  int* const list = memory.take<int>(kProductTile, "list");
  int* const counts = memory.take<int>(kProductThreads / kWarpSize, "counts");
  double* const gains = memory.take<double>(kProductThreads * 4, "gains");
  double* const slices = memory.take<double>(2 * kProductSlice, "slices");
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    __syncthreads();
    const int count = list_in_question(p, b, step, kProductTile, list, counts);
    if (count == 0) continue;
    const Counter counter(p, b);
    const double* const covered = p.covered + b * p.rows;
    ExactTokens columns = p.columns_of<T>(b);
    columns.listed = list, columns.count = count;
    double sum[4] = {};
    for_similarities<T>(p.rows_of<T>(b), columns, 0, 0, 1, slices, [&](int row, int j, float similarity) {
      sum[j] += excess(counter.counted(similarity), step == 0 ? 0.0 : covered[row]);
    });
    const int y = int(threadIdx.x) / 16, x = int(threadIdx.x) % 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) gains[y * kProductTile + x + 16 * j] = sum[j];
    __syncthreads();
    if (int(threadIdx.x) >= count) continue;
    double counted = 0;
    for (int part = 0; part < 16; ++part) counted += gains[part * kProductTile + threadIdx.x];
    const int token = list[threadIdx.x];
    p.ranks(b, step)[token] = rank_of(counter.total(p, b, token, counted));
  }
}

}  // namespace fastok::cuda
