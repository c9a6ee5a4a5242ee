// Rows of codes to a byte each: the sizes that common head dims have, in a few instructions; others by codes_simd.h.
// See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"
#include "quantize/codes_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// `n` rows that lie `stride` bytes apart to rows `pitch` apart.
struct CodeRows {
  const uint8_t* row;
  int64_t stride, n;
  uint8_t* out;
  int64_t pitch;

  template <class One>
  void each(const One& one) const {
    for (int64_t i = 0; i < n; ++i) one(row + i * stride, out + i * pitch);
  }
};

#if defined(__AVX512F__)
// Whether expand_at_once writes these codes and nothing else.
inline bool expands_exactly(int bits, int64_t bytes, int64_t channels) {
  const bool known = bits == 1 ? bytes == 8 : bits == 2 ? bytes == 16 || bytes == 32 : bits == 4 && bytes == 64;
  return known && channels * bits == bytes * 8;
}
// Reads and writes nothing beyond the rows, except that trits read 32 bytes and write as many from each plane on.
inline bool expand_at_once(const CodeRows& rows, int bits, int64_t bytes) {
  if (bits == 0 && bytes <= 32) {  // x / 3 is the upper half of x * 21846 for all bytes
    const __m512i third = _mm512_set1_epi16(21846);
    rows.each([&](const uint8_t* row, uint8_t* out) {
      __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
#pragma GCC unroll 5
      for (int plane = 0; plane < 5; ++plane) {
        const __m512i rest = _mm512_mulhi_epu16(x, third);
        const __m512i digit = _mm512_sub_epi16(x, _mm512_add_epi16(rest, _mm512_add_epi16(rest, rest)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + plane * bytes), _mm512_cvtepi16_epi8(digit));
        x = rest;
      }
    });
    return true;
  }
  if (bits == 1 && bytes == 8) {
    const __m512i chosen = _mm512_sllv_epi64(_mm512_set1_epi8(1), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    rows.each([&](const uint8_t* row, uint8_t* out) {
      int64_t word;
      std::memcpy(&word, row, sizeof word);
      const __mmask64 set = _mm512_test_epi8_mask(_mm512_set1_epi64(word), chosen);
      _mm512_storeu_si512(out, _mm512_maskz_set1_epi8(set, 1));
    });
    return true;
  }
  const __m512i two_bits = _mm512_set1_epi8(3), four_bits = _mm512_set1_epi8(15);
  if (bits == 2 && bytes == 16) {
    const __m512i shift = _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6);
    rows.each([&](const uint8_t* row, uint8_t* out) {
      const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
      _mm512_storeu_si512(out, _mm512_and_si512(_mm512_srlv_epi64(all, shift), two_bits));
    });
    return true;
  }
  if (bits == 2 && bytes == 32) {
    const __m512i low = _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2), high = _mm512_setr_epi64(4, 4, 4, 4, 6, 6, 6, 6);
    rows.each([&](const uint8_t* row, uint8_t* out) {
      const __m512i all = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
      _mm512_storeu_si512(out, _mm512_and_si512(_mm512_srlv_epi64(all, low), two_bits));
      _mm512_storeu_si512(out + 64, _mm512_and_si512(_mm512_srlv_epi64(all, high), two_bits));
    });
    return true;
  }
  if (bits == 4 && bytes == 64) {
    rows.each([&](const uint8_t* row, uint8_t* out) {
      const __m512i all = _mm512_loadu_si512(row);
      _mm512_storeu_si512(out, _mm512_and_si512(all, four_bits));
      _mm512_storeu_si512(out + 64, _mm512_and_si512(_mm512_srli_epi64(all, 4), four_bits));
    });
    return true;
  }
  return false;
}
#else
inline bool expands_exactly(int, int64_t, int64_t) { return false; }
inline bool expand_at_once(const CodeRows&, int, int64_t) { return false; }
#endif

// As expand_row, with its slack.
inline void expand_codes(const uint8_t* row, int bits, int64_t channels, uint8_t* out) {
  if (!expand_at_once({row, 0, 1, out, 0}, bits, kv_code_bytes(bits, channels))) expand_row(row, bits, channels, out);
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
