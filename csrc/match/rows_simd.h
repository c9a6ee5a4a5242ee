// How the engines of matching read rows, and the running best that they share. See cpu/dispatch.h for the rule about
// linkage.
#pragma once
#include "cpu/simd.h"
#include "match/match.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Columns are taken in chunks that stay in the second-level cache while all row panels pass over them.
constexpr int64_t kChunkBytes = 384 << 10;

template <class T>
void widen_row(const T* x, int64_t width, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(x + d));
  for (; d < width; ++d) out[d] = widen(x[d]);
}

void widen_row(const Rows& rows, int64_t row, float* out) {
  const int64_t position = rows.positions ? rows.positions[row] : row;
  const int64_t offset = position * rows.stride;
  switch (rows.dtype) {
    case Dtype::f16:
      return widen_row(static_cast<const f16*>(rows.data) + offset, rows.width, out);
    case Dtype::bf16:
      return widen_row(static_cast<const bf16*>(rows.data) + offset, rows.width, out);
    default:
      return widen_row(static_cast<const float*>(rows.data) + offset, rows.width, out);
  }
}

bool is_candidate(const Rows& rows, int64_t row) {
  const int64_t position = rows.positions ? rows.positions[row] : row;
  return position >= rows.first_position && (!rows.mask || rows.mask[row]);
}

// A power of two near 1/max|x|, so that neither squares nor sums of squares overflow or vanish.
float range_scale(const float* x, int64_t width) {
  vf peak = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) peak = maximum(absolute(load(x + d)), peak);
  float top = horizontal_max(peak);
  for (; d < width; ++d) top = __builtin_fabsf(x[d]) > top ? __builtin_fabsf(x[d]) : top;
  if (!(top > 0x1p-126f && top < kInfinity)) return top > 0 && top < kInfinity ? 0x1p126f : 1.0f;
  const uint32_t exponent = bits_of(top) >> 23;
  return float_of((exponent >= 253 ? 1u : 254 - exponent) << 23);
}

float sum_of_squares(const float* x, int64_t width) {
  vf sum = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) sum = fma(load(x + d), load(x + d), sum);
  float total = horizontal_sum(sum);
  for (; d < width; ++d) total += x[d] * x[d];
  return total;
}

void scale_row(float* x, int64_t width, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(x + d, load(x + d) * splat(factor));
  for (; d < width; ++d) x[d] *= factor;
}

void divide_row(float* x, int64_t width, float divisor) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(x + d, load(x + d) / splat(divisor));
  for (; d < width; ++d) x[d] /= divisor;
}

// What to divide a row by: max(its norm, 1e-12). A row whose squares leave fp32's range is first multiplied by a power
// of two, in place, and so is the norm.
float clamped_norm(float* x, int64_t width) {
  constexpr float kSmallestSafeSquare = 0x1p-80f, kLargestSafeSquare = 0x1p80f;
  float total = sum_of_squares(x, width), scale = 1.0f;
  if (!(total >= kSmallestSafeSquare && total <= kLargestSafeSquare)) {
    scale = range_scale(x, width);
    if (scale != 1.0f) {
      scale_row(x, width, scale);
      total = sum_of_squares(x, width);
    }
  }
  const float norm = __builtin_sqrtf(total);
  return norm < 1e-12f * scale ? 1e-12f * scale : norm;
}

// The best column so far of each row, one candidate per vector lane.
template <int kTileRows>
struct Running {
  float score[kTileRows][kLanes];
  int32_t column[kTileRows][kLanes];

  void reset() {
    for (int i = 0; i < kTileRows; ++i) {
      store(score[i], splat(-kInfinity));
      store(column[i], splat(int32_t(-1)));
    }
  }
  // Columns arrive in ascending order, so a strict comparison keeps the lowest of equals in every lane.
  inline __attribute__((always_inline)) void update(int i, vf s0, vf s1, vi c0) {
    const vmask second = greater(s1, s0);
    const vmask alone = either(second, unordered(s0));  // a NaN in s0 must not hide s1
    const vf s = select(alone, s1, s0);
    const vi c = select(alone, add(c0, splat(int32_t(kLanes))), c0);
    const vf before = load(score[i]);
    const vmask better = greater(s, before);
    store(score[i], select(better, s, before));
    store(column[i], select(better, c, load(column[i])));
  }
  // A lane that holds more than -inf holds a column too.
  void finish(int i, float& best, int32_t& mate) const {
    best = horizontal_max(load(score[i]));
    int32_t lowest = std::numeric_limits<int32_t>::max();
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t c = score[i][lane] == best ? column[i][lane] : lowest;
      lowest = c < lowest ? c : lowest;
    }
    mate = best > -kInfinity ? lowest : -1;
  }
};

// Row panels are taken in groups whose running best stays in the first-level cache.
constexpr int64_t kGroup = 8;

const vi lane_numbers() {
  int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return load(lane);
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
