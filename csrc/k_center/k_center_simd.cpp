// Exact distances, approximate ones with a bound on their error, and the scans over what is known of the tokens.
#include "cpu/exact_simd.h"
#include "cpu/tile_simd.h"
#include "k_center/k_center.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- exact distances ------------------------------------------------------------------------------------------------

void measure_rows(const TokenRows& rows, int64_t begin, int64_t end, TokenScale* out) {
  for (int64_t i = begin; i < end; ++i) out[i] = measure(rows, i);
}

void cosine_distances(const TokenRows& rows, const TokenScale* scales, const double* center, double center_norm,
                      int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i)
    with_row(rows, i, [&](const auto* x) {
      const double product = scales[i].finite ? dot(x, scales[i].scale, center, rows.width) : 0.0;
      out[i - begin] = 1.0f - cosine(product, center_norm, scales[i].norm);
    });
}

void euclidean_distances(const TokenRows& rows, const double* center, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i)
    with_row(rows, i,
             [&](const auto* x) { out[i - begin] = float(__builtin_sqrt(squared_distance(x, center, rows.width))); });
}

// ---- approximate products: fp32 -------------------------------------------------------------------------------------
// A panel is [width][kRows] or [width][kCols] floats, the tokens' integers, which fp32 holds exactly.

size_t row_panel_bytes(int64_t width) { return size_t(width) * kRows * sizeof(float); }
size_t col_panel_bytes(int64_t width) { return size_t(width) * kCols * sizeof(float); }

template <int kPanel>
void pack_token(const TokenRows& rows, const TokenScale* scales, int64_t token, int place, float* out) {
  if (token < 0 || !scales[token].finite) {
    for (int64_t d = 0; d < rows.width; ++d) out[d * kPanel + place] = 0;
    return;
  }
  with_row(rows, token, [&](const auto* x) {
    for_steps(x, rows.width, [&](int64_t d, const vf* part) {
      float q[kStep];
      for (int i = 0; i < kStepVectors; ++i) store(q + i * kLanes, to_integers(part[i] * splat(scales[token].scale)));
      const int64_t count = rows.width - d < kStep ? rows.width - d : kStep;
      for (int64_t e = 0; e < count; ++e) out[(d + e) * kPanel + place] = q[e];
    });
  });
}

float pack_rows(const TokenRows& rows, const TokenScale* scales, const int32_t* listed, int64_t count, int64_t first,
                void* out) {
  for (int i = 0; i < kRows; ++i)
    pack_token<kRows>(rows, scales,
                      first + i >= count ? -1
                      : listed           ? listed[first + i]
                                         : first + i,
                      i, static_cast<float*>(out));
  return 0;
}
float pack_cols(const TokenRows& rows, const TokenScale* scales, int64_t first, void* out) {
  for (int i = 0; i < kCols; ++i)
    pack_token<kCols>(rows, scales, first + i < rows.count ? first + i : -1, i, static_cast<float*>(out));
  return 0;
}

void multiply(const void* row_panel, const void* col_panel, int64_t width, float* out, int64_t pitch) {
  multiply_panels<Fma>(static_cast<const float*>(row_panel), static_cast<const float*>(col_panel), width, out, pitch);
}

void nothing() {}

// ---- approximate products: bf16 -------------------------------------------------------------------------------------
#if defined(__AVX512BF16__)

// x * scale rounded to bf16. Returns the norm of the difference to the token's integers, relative to their norm.
template <bool kColumns>
float pack_bf16_token(const TokenRows& rows, const TokenScale* scales, int64_t token, int place, bf16* panel) {
  const int64_t n_blocks = blocks(rows.width);
  if (token < 0 || !scales[token].finite) {
    const bf16 zeros[kDepth] = {};
    for (int64_t block = 0; block < n_blocks; ++block)
      Bf16Panels::place<kColumns>(zeros, place, block, n_blocks, panel);
    return 0;
  }
  vf lost = splat(0.0f);
  with_row(rows, token, [&](const auto* x) {
    for_steps(x, rows.width, [&](int64_t d, const vf* part) {
      alignas(64) bf16 depth[kDepth];
      for (int i = 0; i < kStepVectors; ++i) {
        const vf q = part[i] * splat(scales[token].scale);
        store(depth + i * kLanes, q);
        const vf difference = to_integers(q) - load(depth + i * kLanes);
        lost = fma(difference, difference, lost);
      }
      Bf16Panels::place<kColumns>(depth, place, d / kDepth, n_blocks, panel);
    });
  });
  return __builtin_sqrtf(horizontal_sum(lost)) * 1.0001f / float(scales[token].norm);
}

float pack_bf16_rows(const TokenRows& rows, const TokenScale* scales, const int32_t* listed, int64_t count,
                     int64_t first, void* out) {
  float worst = 0;
  for (int i = 0; i < Bf16Panels::kRows; ++i) {
    const int64_t token = first + i >= count ? -1 : listed ? listed[first + i] : first + i;
    const float error = pack_bf16_token<false>(rows, scales, token, i, static_cast<bf16*>(out));
    worst = error > worst ? error : worst;
  }
  return worst;
}
float pack_bf16_cols(const TokenRows& rows, const TokenScale* scales, int64_t first, void* out) {
  float worst = 0;
  for (int i = 0; i < Bf16Panels::kCols; ++i) {
    const int64_t token = first + i < rows.count ? first + i : -1;
    const float error = pack_bf16_token<true>(rows, scales, token, i, static_cast<bf16*>(out));
    worst = error > worst ? error : worst;
  }
  return worst;
}

size_t bf16_row_bytes(int64_t width) { return Bf16Panels::bytes(width, Bf16Panels::kRows); }
size_t bf16_col_bytes(int64_t width) { return Bf16Panels::bytes(width, Bf16Panels::kCols); }

void multiply_bf16(const void* row_panel, const void* col_panel, int64_t width, float* out, int64_t pitch) {
  Bf16Panels::multiply(row_panel, col_panel, blocks(width), out, pitch);
}

constexpr ScreenEngine kBf16Engine = {Bf16Panels::kRows, Bf16Panels::kCols, bf16_row_bytes,
                                      bf16_col_bytes,    pack_bf16_rows,    pack_bf16_cols,
                                      Bf16Panels::begin, Bf16Panels::end,   multiply_bf16};
#endif

// ---- from products to bounds ----------------------------------------------------------------------------------------

// NaN, of a token that is not available, loses against everything.
inline vf minimum(vf a, vf b) { return select(greater(b, a), a, b); }

void finish_distances(float* products, int64_t n, float row_factor, const float* col_factor) {
  for (int64_t j = 0; j < n; j += kLanes)
    store(products + j, splat(1.0f) - load(products + j) * splat(row_factor) * load(col_factor + j));
}

void finish_block(float* block, int64_t rows, int64_t cols, int64_t pitch, const float* row_factor,
                  const float* col_factor, float* row_nearest, float* col_nearest) {
  for (int64_t i = 0; i < rows; ++i) {
    float* const row = block + i * pitch;
    vf nearest = splat(kInfinity);
    for (int64_t j = 0; j < cols; j += kLanes) {
      const vf distance = splat(1.0f) - load(row + j) * splat(row_factor[i]) * load(col_factor + j);
      store(row + j, distance);
      store(col_nearest + j, minimum(distance, load(col_nearest + j)));
      nearest = minimum(distance, nearest);
    }
    const float best = -horizontal_max(splat(0.0f) - nearest);
    row_nearest[i] = best < row_nearest[i] ? best : row_nearest[i];
  }
}

int64_t lower_bounds(const float* distance, float error, int64_t n, float* upper, int32_t* hits) {
  int64_t count = 0;
  for (int64_t j = 0; j < n; j += kLanes) {
    const vf d = load(distance + j), known = load(upper + j), low = maximum(splat(0.0f), d - splat(error));
    const vmask nearer = greater(known, low);
    if (!any(nearer)) continue;
    store(upper + j, select(nearer, minimum(d + splat(error), known), known));
    float before[kLanes], least[kLanes];
    store(before, known);
    store(least, low);
    for (int lane = 0; lane < kLanes; ++lane) {
      hits[count] = int32_t(j + lane);
      count += least[lane] < before[lane];
    }
  }
  return count;
}

// The next smaller number, for one that is not -inf.
float just_below(float x) {
  const uint32_t bits = bits_of(x);
  return float_of(x == 0 ? 0x80000001u : x > 0 ? bits - 1 : bits + 1);
}

int64_t first_largest(const float* x, int64_t n) {
  vf top = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) top = maximum(load(x + j), top);
  const float best = horizontal_max(top);
  if (best == -kInfinity) return -1;
  const vf bar = splat(just_below(best));
  int64_t j = 0;
  while (!any(greater(load(x + j), bar))) j += kLanes;
  while (x[j] < best) ++j;
  return j;
}

}  // namespace

extern const CenterKernels k_center_kernels;
const CenterKernels k_center_kernels = {
    {kRows, kCols, row_panel_bytes, col_panel_bytes, pack_rows, pack_cols, nothing, nothing, multiply},
#if defined(__AVX512BF16__)
    &kBf16Engine,
#else
    nullptr,
#endif
    measure_rows,
    widen_row,
    cosine_distances,
    euclidean_distances,
    finish_distances,
    finish_block,
    lower_bounds,
    first_largest,
};

}  // namespace fastok::FASTOK_ISA
