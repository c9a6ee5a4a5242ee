// Sort keys of scores; exact and screened squared distances.
#include "cpu/simd.h"
#include "select/select.h"

namespace fastok::FASTOK_ISA {
namespace {

// ---- scores ---------------------------------------------------------------------------------------------------------

template <class T>
void keys_of(const T* scores, int64_t stride, int64_t n, uint32_t* out) {
  constexpr int kChunk = 64;
  static_assert(kChunk % kLanes == 0);
  float x[kChunk];
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int count = int(n - begin < kChunk ? n - begin : kChunk);
    if (stride == 1 && count == kChunk) {
      for (int i = 0; i < kChunk; i += kLanes) store(x + i, load(scores + begin + i));
    } else {
      for (int i = 0; i < count; ++i) x[i] = widen(scores[(begin + i) * stride]);
    }
    for (int i = 0; i < count; ++i) {
      const uint32_t bits = bits_of(x[i] + 0.0f);  // -0 ties with 0
      const uint32_t key = bits ^ (~uint32_t(int32_t(bits) >> 31) & 0x7fffffffu);
      out[begin + i] = x[i] != x[i] ? kKeyUnscored : key;
    }
  }
}

void keys(Dtype dtype, const void* scores, int64_t stride, int64_t n, uint32_t* out) {
  switch (dtype) {
    case Dtype::f16:
      return keys_of(static_cast<const f16*>(scores), stride, n, out);
    case Dtype::bf16:
      return keys_of(static_cast<const bf16*>(scores), stride, n, out);
    default:
      return keys_of(static_cast<const float*>(scores), stride, n, out);
  }
}

// ---- distances ------------------------------------------------------------------------------------------------------

template <class T>
float centred_row(const T* x, const float* centre, int64_t width, float* out) {
  vf sum = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    const vf y = load(x + d) - load(centre + d);
    store(out + d, y);
    sum = fma(y, y, sum);
  }
  float total = horizontal_sum(sum);
  for (; d < width; ++d) {
    out[d] = widen(x[d]) - centre[d];
    total += out[d] * out[d];
  }
  return total;
}

float centred(Dtype dtype, const void* x, const float* centre, int64_t width, float* out) {
  switch (dtype) {
    case Dtype::f16:
      return centred_row(static_cast<const f16*>(x), centre, width, out);
    case Dtype::bf16:
      return centred_row(static_cast<const bf16*>(x), centre, width, out);
    default:
      return centred_row(static_cast<const float*>(x), centre, width, out);
  }
}

template <class T>
void add_row_of(const T* x, int64_t width, float* sum) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(sum + d, load(sum + d) + load(x + d));
  for (; d < width; ++d) sum[d] += widen(x[d]);
}

void add_row(Dtype dtype, const void* x, int64_t width, float* sum) {
  switch (dtype) {
    case Dtype::f16:
      return add_row_of(static_cast<const f16*>(x), width, sum);
    case Dtype::bf16:
      return add_row_of(static_cast<const bf16*>(x), width, sum);
    default:
      return add_row_of(static_cast<const float*>(x), width, sum);
  }
}

constexpr int kSums = 16;

template <class T>
float squared_distance_of(const T* x, const T* y, int64_t width) {
  constexpr int kVectors = kSums / kLanes;
  vf sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = splat(0.0f);
  int64_t d = 0;
  for (; d + kSums <= width; d += kSums) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const vf difference = load(x + d + v * kLanes) - load(y + d + v * kLanes);
      sum[v] = sum[v] + difference * difference;
    }
  }
  float total[kSums];
  for (int v = 0; v < kVectors; ++v) store(total + v * kLanes, sum[v]);
  for (int i = 0; d < width; ++d, ++i) {
    const float difference = widen(x[d]) - widen(y[d]);
    total[i] += difference * difference;
  }
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) total[i] += total[i + half];
  return total[0];
}

float squared_distance(Dtype dtype, const void* x, const void* y, int64_t width) {
  switch (dtype) {
    case Dtype::f16:
      return squared_distance_of(static_cast<const f16*>(x), static_cast<const f16*>(y), width);
    case Dtype::bf16:
      return squared_distance_of(static_cast<const bf16*>(x), static_cast<const bf16*>(y), width);
    default:
      return squared_distance_of(static_cast<const float*>(x), static_cast<const float*>(y), width);
  }
}

int64_t screen(const float* dots, int64_t pitch, int64_t n_rows, int64_t n_columns, const float* low_row,
               const float* low_column, const float* bar_row, const float* bar_column, Candidate* out) {
  int64_t found = 0;
  const vf minus_two = splat(-2.0f);
  for (int64_t i = 0; i < n_rows; ++i) {
    const vf of_row = splat(low_row[i]), bar = splat(bar_row[i]);
    for (int64_t j = 0; j < n_columns; j += kLanes) {
      // low_column and bar_column are padded to whole vectors: NaN never passes.
      const vf low = fma(minus_two, load(dots + i * pitch + j), of_row + load(low_column + j));
      const vmask passes =
          bar_column ? either(greater(bar, low), greater(load(bar_column + j), low)) : greater(bar, low);
      if (!any(passes)) continue;
      float lows[kLanes];
      store(lows, low);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(lows[lane] < bar_row[i] || (bar_column && lows[lane] < bar_column[j + lane]))) continue;
        out[found++] = {int32_t(i), int32_t(j + lane), lows[lane]};
      }
    }
  }
  return found;
}

}  // namespace

extern const SelectKernels select_kernels;
const SelectKernels select_kernels = {keys, centred, add_row, squared_distance, screen};

}  // namespace fastok::FASTOK_ISA
