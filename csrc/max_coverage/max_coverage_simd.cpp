// Columns of similarities, and exact sums over them.
#include "cpu/exact_simd.h"
#include "max_coverage/max_coverage.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void measure_rows(const TokenRows& rows, int64_t begin, int64_t end, TokenScale* out) {
  for (int64_t i = begin; i < end; ++i) out[i] = measure(rows, i);
}

template <class T>
void gather_as(const SimilarityRows& matrix, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kBlockColumns = 16;  // so many neighbours share a cache line
  for (int64_t first = begin; first < end; first += kBlockColumns) {
    const int64_t last = first + kBlockColumns < end ? first + kBlockColumns : end;
    for (int64_t r = 0; r < matrix.rows; ++r) {
      const T* const row = static_cast<const T*>(matrix.data) + r * matrix.row_stride;
      for (int64_t j = first; j < last; ++j) out[(j - begin) * matrix.rows + r] = widen(row[j * matrix.stride]);
    }
  }
}

void gather(const SimilarityRows& matrix, int64_t begin, int64_t end, float* out) {
  switch (matrix.dtype) {
    case Dtype::f16:
      return gather_as<f16>(matrix, begin, end, out);
    case Dtype::bf16:
      return gather_as<bf16>(matrix, begin, end, out);
    default:
      return gather_as<float>(matrix, begin, end, out);
  }
}

inline double sum_of(vd x) {
  double lane[kWide], total = 0;
  store_wide(lane, x);
  for (int i = 0; i < kWide; ++i) total += lane[i];
  return total;
}

// Products of a token's integers with those of kCenters widened tokens, `pitch` apart. Exact, hence in any order.
template <class T>
inline void dots(const T* x, float scale, const double* centers, int64_t pitch, int64_t width, double* out) {
  vd sum[kCenters][2];
#pragma GCC unroll 4
  for (int c = 0; c < kCenters; ++c) sum[c][0] = sum[c][1] = splat_wide(0.0);
  for_steps(x, width, [&](int64_t d, const vf* part) {
#pragma GCC unroll 8
    for (int i = 0; i < kStepVectors; ++i) {
      const vf q = to_integers(part[i] * splat(scale));
      const vd low = lower_half(q), high = upper_half(q);
      const double* const at = centers + d + i * kLanes;
#pragma GCC unroll 4
      for (int c = 0; c < kCenters; ++c) {
        sum[c][0] = fma_wide(low, load_wide(at + c * pitch), sum[c][0]);
        sum[c][1] = fma_wide(high, load_wide(at + c * pitch + kWide), sum[c][1]);
      }
    }
  });
  for (int c = 0; c < kCenters; ++c) out[c] = sum_of(sum[c][0] + sum[c][1]);
}

void cosines(const TokenRows& y, const TokenScale* y_scales, const TokenRows& x, const TokenScale* x_scales,
             int64_t begin, int64_t end, double* scratch, float* out) {
  const int64_t pitch = (x.width + kStep - 1) / kStep * kStep;
  for (int64_t first = begin; first < end; first += kCenters) {
    const int64_t count = end - first < kCenters ? end - first : kCenters;
    for (int64_t c = 0; c < kCenters; ++c) {
      double* const center = scratch + c * pitch;
      for (int64_t d = 0; d < pitch; ++d) center[d] = 0;
      if (c < count && x_scales[first + c].finite) widen_row(x, first + c, x_scales[first + c].scale, center);
    }
    for (int64_t r = 0; r < y.count; ++r) {
      double product[kCenters] = {};
      if (y_scales[r].finite)
        with_row(y, r, [&](const auto* row) { dots(row, y_scales[r].scale, scratch, pitch, y.width, product); });
      for (int64_t c = 0; c < count; ++c) {
        const TokenScale& token = x_scales[first + c];
        const bool finite = y_scales[r].finite && token.finite;
        out[(first + c - begin) * y.count + r] = finite ? cosine(product[c], y_scales[r].norm, token.norm) : kNaN;
      }
    }
  }
}

float peak(const float* column, int64_t rows) {
  float top = 0;
  for (int64_t r = 0; r < rows; ++r) top = column[r] > top && column[r] < kInfinity ? column[r] : top;
  return top;
}

// ---- counted similarities -------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline vd counted(vd x) { return _mm512_roundscale_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 0 where x is at most y, else x - y: NaN where x is.
inline vd excess(vd x, vd y) { return _mm512_maskz_sub_pd(_mm512_cmp_pd_mask(x, y, _CMP_NLE_UQ), x, y); }
inline vd larger(vd x, vd y) { return _mm512_mask_mov_pd(y, _mm512_cmp_pd_mask(x, y, _CMP_GT_OQ), x); }
#elif defined(__AVX2__)
inline vd counted(vd x) { return _mm256_round_pd(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vd excess(vd x, vd y) { return _mm256_and_pd(_mm256_cmp_pd(x, y, _CMP_NLE_UQ), x - y); }
inline vd larger(vd x, vd y) { return _mm256_blendv_pd(y, x, _mm256_cmp_pd(x, y, _CMP_GT_OQ)); }
#else
// Similarities of 2^51 units and more are multiples of 2^28.
inline vd counted(vd x) { return vd{to_integer(x[0]), to_integer(x[1])}; }
inline vd excess(vd x, vd y) { return vd{x[0] <= y[0] ? 0 : x[0] - y[0], x[1] <= y[1] ? 0 : x[1] - y[1]}; }
inline vd larger(vd x, vd y) { return vd{x[0] > y[0] ? x[0] : y[0], x[1] > y[1] ? x[1] : y[1]}; }
#endif

// Calls body(row, counted similarities) for every kWide rows; past the end they are 0, and `covered` has room.
template <class Body>
inline __attribute__((always_inline)) void for_counted(const float* column, double unit, int64_t rows,
                                                       const Body& body) {
  const vd units = splat_wide(unit);
  int64_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    const vf part = load(column + r);
    body(r, counted(lower_half(part) * units));
    body(r + kWide, counted(upper_half(part) * units));
  }
  if (r == rows) return;
  float rest[kLanes] = {};
  for (int64_t e = r; e < rows; ++e) rest[e - r] = column[e];
  const vf part = load(rest);
  body(r, counted(lower_half(part) * units));
  body(r + kWide, counted(upper_half(part) * units));
}

double gain(const float* column, const double* covered, double unit, int64_t rows) {
  vd sum = splat_wide(0.0);
  for_counted(column, unit, rows, [&](int64_t r, vd x) { sum = sum + excess(x, load_wide(covered + r)); });
  return sum_of(sum);
}

void cover(const float* column, double* covered, double unit, int64_t rows) {
  for_counted(column, unit, rows, [&](int64_t r, vd x) { store_wide(covered + r, larger(x, load_wide(covered + r))); });
}

}  // namespace

extern const CoverageKernels max_coverage_kernels;
const CoverageKernels max_coverage_kernels = {measure_rows, gather, cosines, peak, gain, cover};

}  // namespace fastok::FASTOK_ISA
