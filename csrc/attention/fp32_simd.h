// Attention's fp32 engine: packing for products of fp32 vectors.
#pragma once
#include "attention/vector_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

#if defined(__AVX512F__)
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

struct Fp32 : VectorTiles<Fma> {
  static constexpr bool kScaledRows = true;  // the scale is in the packed rows

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
};

}  // namespace
}  // namespace fastok::FASTOK_ISA
