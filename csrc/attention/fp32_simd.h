// Attention's fp32 engine: packing, and the two products of a block of rows with a block of keys.
#pragma once
#include "attention/rows_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

#if defined(__AVX512F__)
// 16 vectors to their transpose.
inline __attribute__((always_inline)) void transpose(vf (&r)[16]) {
  vf t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](vf a, vf b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](vf a, vf b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  // r[4 i + c]: column c (and c + 4, c + 8, c + 12 in the further quarters) of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const vf a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const vf d = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

template <int kPitch, class T>
void transpose_keys(const T* k, int64_t stride, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += kLanes) {
    vf r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load(k + i * stride + d);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(out + (d + i) * kPitch, r[i]);
  }
}

// 16 keys from `first` on, to [width][kPitch].
template <int kPitch>
void transpose_keys(const HeadRows& k, Dtype dtype, int64_t first, float* out) {
  for (int64_t i = 0; i < kLanes; ++i) prefetch_row(k, first + kLanes + i);
  const int64_t at = first * k.stride;
  switch (dtype) {
    case Dtype::f16:
      return transpose_keys<kPitch>(static_cast<const f16*>(k.data) + at, k.stride, k.width, out);
    case Dtype::bf16:
      return transpose_keys<kPitch>(static_cast<const bf16*>(k.data) + at, k.stride, k.width, out);
    default:
      return transpose_keys<kPitch>(static_cast<const float*>(k.data) + at, k.stride, k.width, out);
  }
}
#endif

struct Fp32 {
  // A register tile of kTileRows x (2 vectors): accumulators, two columns and one broadcast fill the register file.
#if defined(__AVX512F__)
  static constexpr int kTileRows = 12;
#elif defined(__AVX2__)
  static constexpr int kTileRows = 6;
#else
  static constexpr int kTileRows = 4;
#endif
  static constexpr int kStep = 2 * kLanes;  // keys, or channels of the values, of a tile
  static constexpr int kRows = 48, kKeys = 128;
  static constexpr bool kScaledRows = true;  // the scale is in the packed rows
  using Weight = float;                      // of a value
  static_assert(kRows % kTileRows == 0 && kKeys % kStep == 0);

  static int64_t padded(int64_t width) { return round_up(width, kStep); }
  static size_t row_bytes(int64_t width) { return size_t(kRows * width) * sizeof(float); }
  static size_t key_bytes(int64_t n, int64_t width) { return size_t(round_up(n, kStep) * width) * sizeof(float); }
  static size_t value_bytes(int64_t n, int64_t width) {
    return size_t(round_up(n, kStep) * padded(width)) * sizeof(float);
  }

  // [panel][width][kTileRows]
  static void pack_rows(const AttentionHead& head, const RowList& rows, void* out_bytes) {
    float* const out = static_cast<float*>(out_bytes);
    const int64_t width = head.q.width;
    float row[256];
    for (int64_t i = 0; i < round_up(rows.count, kTileRows); ++i) {
      float* const column = out + i / kTileRows * kTileRows * width + i % kTileRows;
      if (i + kAhead < rows.count) prefetch_row(head.q, rows.at(i + kAhead));
      if (i < rows.count) widen_row(head.q, head.dtype, rows.at(i), head.scale, row);
      for (int64_t d = 0; d < width; ++d) column[d * kTileRows] = i < rows.count ? row[d] : 0.0f;
    }
  }
  // [panel][width][kStep]
  static void pack_keys(const HeadRows& k, Dtype dtype, int64_t begin, int64_t end, void* out_bytes) {
    float* const out = static_cast<float*>(out_bytes);
    float row[256];
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + kLanes <= end - begin && k.width % kLanes == 0; j += kLanes)
      transpose_keys<kStep>(k, dtype, begin + j, out + j / kStep * kStep * k.width + j % kStep);
#endif
    for (; j < round_up(end - begin, kStep); ++j) {
      float* const column = out + j / kStep * kStep * k.width + j % kStep;
      prefetch_row(k, begin + j + kAhead);
      if (begin + j < end) widen_row(k, dtype, begin + j, 1.0f, row);
      for (int64_t d = 0; d < k.width; ++d) column[d * kStep] = begin + j < end ? row[d] : 0.0f;
    }
  }
  // [key][padded width]
  static void pack_values(const HeadRows& v, Dtype dtype, int64_t begin, int64_t end, void* out_bytes) {
    float* const out = static_cast<float*>(out_bytes);
    const int64_t width = padded(v.width);
    for (int64_t j = 0; j < round_up(end - begin, kStep); ++j) {
      float* const row = out + j * width;
      prefetch_row(v, begin + j + kAhead);
      if (begin + j < end) widen_row(v, dtype, begin + j, 1.0f, row);
      for (int64_t d = begin + j < end ? v.width : 0; d < width; ++d) row[d] = 0;
    }
  }

  // out[row][key] of packed rows and packed keys from `key` on, both in whole tiles.
  static void multiply(const void* rows, int64_t n_rows, const void* keys, int64_t key, int64_t n_keys, int64_t width,
                       float* out, int64_t pitch) {
    for (int64_t i = 0; i < n_rows; i += kTileRows)
      for (int64_t j = 0; j < n_keys; j += kStep)
        multiply_tile(static_cast<const float*>(rows) + i * width, static_cast<const float*>(keys) + (key + j) * width,
                      width, out + i * pitch + j, pitch);
  }
  static void multiply_tile(const float* a, const float* b, int64_t width, float* out, int64_t pitch) {
    vf acc[kTileRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) acc[i][0] = acc[i][1] = splat(0.0f);
    for (int64_t d = 0; d < width; ++d) {
      const vf b0 = load(b + d * kStep), b1 = load(b + d * kStep + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const vf x = splat(a[d * kTileRows + i]);
        acc[i][0] = fma(x, b0, acc[i][0]);
        acc[i][1] = fma(x, b1, acc[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      store(out + i * pitch, acc[i][0]);
      store(out + i * pitch + kLanes, acc[i][1]);
    }
  }

  // out[row][channel] += weight[row][key] * values[key from `key` on][channel]; of `n_packed` keys, in whole steps, and
  // of the padded width.
  static void add_values(const float* weight, int64_t n_rows, const void* values, int64_t, int64_t key, int64_t n_keys,
                         int64_t width, float* out) {
    const float* const v = static_cast<const float*>(values) + key * width;
    for (int64_t c = 0; c < width; c += kStep)
      for (int64_t i = 0; i < n_rows; i += kTileRows)
        add_values_tile(weight + i * kKeys, v + c, n_keys, width, out + i * width + c);
  }
  static void add_values_tile(const float* weight, const float* v, int64_t n_keys, int64_t width, float* out) {
    vf acc[kTileRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      acc[i][0] = load(out + i * width);
      acc[i][1] = load(out + i * width + kLanes);
    }
    for (int64_t j = 0; j < n_keys; ++j) {
      const vf v0 = load(v + j * width), v1 = load(v + j * width + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const vf x = splat(weight[i * kKeys + j]);
        acc[i][0] = fma(x, v0, acc[i][0]);
        acc[i][1] = fma(x, v1, acc[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      store(out + i * width, acc[i][0]);
      store(out + i * width + kLanes, acc[i][1]);
    }
  }
  // Where a block's weights go: in place of its scores.
  static float* weights(float* scores, void*) { return scores; }
};

}  // namespace
}  // namespace fastok::FASTOK_ISA
