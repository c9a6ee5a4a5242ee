// bf16 operands of dot-product instructions: numbers that are neighbours along the sum lie side by side in one word.
// And the engine that multiplies them on vectors, where there are no tiles.
#pragma once
#include "attention/vector_simd.h"

#if defined(__AVX512BF16__)

namespace fastok::FASTOK_ISA {
namespace {

inline __attribute__((always_inline)) __mmask32 first_lanes(int64_t n) {
  return n >= 32 ? ~__mmask32(0) : n > 0 ? (__mmask32(1) << n) - 1 : 0;
}

// 16 keys from `first` on to words[pair of depths][kPitch], for `pairs` of them, in whole vectors. Zeros behind the
// last key and the width.
template <int kPitch>
void transpose_pairs(const HeadRows& k, int64_t first, int64_t end, int64_t pairs, float* words) {
  const char* const at = static_cast<const char*>(k.data) + first * k.stride * k.element_bytes;
  const int64_t n = end - first < 16 ? end - first : 16;
  for (int64_t i = 0; i < 16; ++i) prefetch_row(k, first + 16 + i);
  for (int64_t d = 0; d < pairs; d += 16) {
    const __mmask16 wanted = __mmask16(first_lanes(k.width / 2 - d));
    vf r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
      r[i] = _mm512_maskz_loadu_ps(i < n ? wanted : 0, at + (i < n ? i : 0) * k.stride * k.element_bytes + d * 4);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(words + (d + i) * kPitch, r[i]);
  }
}

// Channels [c, c + 16) of keys `key` and `key` + 1, side by side. Zeros behind the last key and the width.
inline __attribute__((always_inline)) vi pair_values(const HeadRows& v, int64_t key, int64_t end, int64_t c) {
  const __mmask16 wanted = __mmask16(first_lanes(v.width - c));
  vi words[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const bool there = key + i < end;
    const bf16* const row = static_cast<const bf16*>(v.data) + (there ? key + i : 0) * v.stride;
    words[i] = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there ? wanted : 0, row + c));
  }
  return _mm512_or_si512(words[0], _mm512_slli_epi32(words[1], 16));
}

// Scores of bf16 products are exact up to fp32 summation; weights of values are rounded to bf16.
struct Bf16Vectors : VectorTiles<Dot> {
  static constexpr bool kScaledRows = false;

  // [panel][pair of depths][kTileRows]
  static void pack_rows(const AttentionHead& head, const RowList& rows, void* out_bytes) {
    uint32_t* const out = static_cast<uint32_t*>(out_bytes);
    const int64_t words = head.q.width / 2;
    uint32_t row[256 / 2];
    for (int64_t i = 0; i < round_up(rows.count, kTileRows); ++i) {
      uint32_t* const column = out + i / kTileRows * kTileRows * words + i % kTileRows;
      if (i + kAhead < rows.count) prefetch_row(head.q, rows.at(i + kAhead));
      if (i < rows.count)
        std::memcpy(row, static_cast<const bf16*>(head.q.data) + rows.at(i) * head.q.stride, size_t(words) * 4);
      for (int64_t d = 0; d < words; ++d) column[d * kTileRows] = i < rows.count ? row[d] : 0;
    }
  }
  // [panel][pair of depths][kStep]
  static void pack_keys(const HeadRows& k, Dtype, int64_t begin, int64_t end, void* out) {
    const int64_t words = k.width / 2;
    alignas(64) float part[256 / 2 * 16];
    for (int64_t j = begin; j < begin + round_up(end - begin, kStep); j += 16) {
      float* const to = static_cast<float*>(out) + ((j - begin) / kStep * words * kStep + (j - begin) % kStep);
      if (words % 16 == 0) {
        transpose_pairs<kStep>(k, j, end, words, to);
      } else {
        transpose_pairs<16>(k, j, end, words, part);
        for (int64_t d = 0; d < words; ++d) store(to + d * kStep, load(part + d * 16));
      }
    }
  }
  // [pair of keys][padded width]
  static void pack_values(const HeadRows& v, Dtype, int64_t begin, int64_t end, void* out) {
    const int64_t width = padded(v.width);
    for (int64_t j = 0; j < round_up(end - begin, kStep); j += 2) {
      prefetch_row(v, begin + j + kAhead);
      prefetch_row(v, begin + j + kAhead + 1);
      for (int64_t c = 0; c < width; c += 16)
        store(static_cast<int32_t*>(out) + j / 2 * width + c, pair_values(v, begin + j, end, c));
    }
  }
};

}  // namespace
}  // namespace fastok::FASTOK_ISA

#endif
