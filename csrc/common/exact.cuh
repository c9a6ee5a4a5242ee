// Tokens whose products are the same bits on every backend (python/fastok/reference/k_center.py), for kernels.
// Torch-free.
#pragma once
#include <cmath>

#include "common/device.cuh"

namespace fastok::cuda {

// Tokens of one sample. Their integers are round(x * scale), 0 where the scale is.
struct ExactTokens {
  const void* x;
  int64_t row_stride;
  const float* scale;
  const double* norm;  // of the integers
  const int* listed;   // the tokens meant, in order; nullptr: all
  int count, width;

  __device__ __forceinline__ int token(int i) const { return listed ? listed[i] : i; }
  template <class T>
  __device__ __forceinline__ const T* row(int j) const {
    return static_cast<const T*>(x) + j * row_stride;
  }
};

// Lane l and lane l + 16 first, then l and l + 8, ...: the order in which the specification adds 32 lanes.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int half = kWarpSize / 2; half > 0; half /= 2) x += __shfl_xor_sync(kFullWarp, x, half);
  return x;
}

__device__ __forceinline__ double integer_of(float x, float scale) {
  return scale == 0 ? 0.0 : double(rintf(x * scale));
}

__device__ __forceinline__ float exact_cosine(double product, double norm_a, double norm_b) {
  return float(product / (norm_a * norm_b));
}

// The product of two tokens' integers, by a warp.
template <class T>
__device__ __forceinline__ double exact_dot(const T* a, float a_scale, const T* b, float b_scale, int width) {
  double sum = 0;
  for (int d = lane_index(); d < width; d += kWarpSize)
    sum += integer_of(widen(a[d]), a_scale) * integer_of(widen(b[d]), b_scale);
  return warp_sum(sum);
}

// ---- what is measured of a token ------------------------------------------------------------------------------------

__device__ __forceinline__ int exponent_of(double x) { return x == 0 ? 0 : ilogb(x) + 1; }  // as frexp

struct MeasuredToken {
  bool finite;
  float scale;          // a power of two; 0 if not finite
  double norm, length;  // of the integers, clamped as the token's at 1e-12; of the token, by its integers
};

// By a warp, whose lanes all get it.
template <class T>
__device__ __forceinline__ MeasuredToken measure_token(const T* x, int width) {
  float peak = 0, odd = 0;
  for (int d = lane_index(); d < width; d += kWarpSize) {
    const float value = widen(x[d]);
    odd += value * 0.0f;  // NaN from then on if one is not finite
    peak = fmaxf(peak, fabsf(value));
  }
  for (int half = kWarpSize / 2; half > 0; half /= 2) {
    odd += __shfl_xor_sync(kFullWarp, odd, half);
    peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, half));
  }
  if (isnan(odd)) return {false, 0, 1, 0};
  if (peak == 0) return {true, 1, 1, 0};

  const int peak_exponent = exponent_of(double(peak));
  const double unit = scalbn(1.0, 12 - peak_exponent);
  double bound = 0;
  for (int d = lane_index(); d < width; d += kWarpSize) {
    const double value = double(widen(x[d])) * unit;
    bound += ceil(value * value);
  }
  const int exponent = min(36 - (exponent_of(warp_sum(bound)) + 1) / 2 - peak_exponent, 63);
  const float scale = float(scalbn(1.0, exponent));
  double squares = 0;
  for (int d = lane_index(); d < width; d += kWarpSize) {
    const double q = integer_of(widen(x[d]), scale);
    squares += q * q;
  }
  const double norm = sqrt(warp_sum(squares)), least = 1e-12 * scalbn(1.0, exponent);
  return {true, scale, norm > least ? norm : least, norm * scalbn(1.0, -exponent)};
}

// ---- products of many tokens ----------------------------------------------------------------------------------------

constexpr int kProductTile = 64;   // tokens on each side of a block's products
constexpr int kProductDepth = 16;  // channels at once
constexpr int kProductThreads = 256;
constexpr int kProductSlice = kProductDepth * (kProductTile + 1);  // numbers of one side at once

// A tile's integers on their way through shared memory, [depth][token].
template <class T>
__device__ __forceinline__ void carry_slice(const ExactTokens& tokens, int first, int depth, double* slice) {
  for (int e = int(threadIdx.x); e < kProductTile * kProductDepth; e += kProductThreads) {
    const int i = first + e / kProductDepth, d = depth + e % kProductDepth;
    double q = 0;
    if (i < tokens.count && d < tokens.width) {
      const int j = tokens.token(i);
      q = integer_of(widen(tokens.row<T>(j)[d]), tokens.scale[j]);
    }
    slice[(e % kProductDepth) * (kProductTile + 1) + e / kProductDepth] = q;
  }
}

// By a block of kProductThreads: thread 16 y + x gets in sum[i][j] the product of row first_row + y + 16 i with column
// first_column + x + 16 j; 0 past either's count. The slices hold kProductSlice numbers each.
template <class T>
__device__ __forceinline__ void multiply_tile(const ExactTokens& rows, int first_row, const ExactTokens& columns,
                                              int first_column, double* row_slice, double* column_slice,
                                              double (&sum)[4][4]) {
  const int y = int(threadIdx.x) / 16, x = int(threadIdx.x) % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0;
  for (int depth = 0; depth < rows.width; depth += kProductDepth) {
    __syncthreads();
    carry_slice<T>(rows, first_row, depth, row_slice);
    carry_slice<T>(columns, first_column, depth, column_slice);
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < kProductDepth; ++d) {
      double row[4], column[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        row[i] = row_slice[d * (kProductTile + 1) + y + 16 * i];
        column[i] = column_slice[d * (kProductTile + 1) + x + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] += row[i] * column[j];
    }
  }
}

}  // namespace fastok::cuda
