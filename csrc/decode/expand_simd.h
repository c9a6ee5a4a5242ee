// Rows of codes to a byte each: the sizes that common head dims have, in a few instructions; others by codes_simd.h.
// See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"
#include "quantize/codes_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

#if defined(__AVX512F__)
inline bool expand_at_once(const uint8_t* row, int bits, int64_t bytes, uint8_t* out) {
  if (bits == 0 && bytes <= 32) {  // x / 3 is the upper half of x * 21846 for all bytes
    __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    const __m512i third = _mm512_set1_epi16(21846);
#pragma GCC unroll 5
    for (int plane = 0; plane < 5; ++plane) {
      const __m512i rest = _mm512_mulhi_epu16(x, third);
      const __m512i digit = _mm512_sub_epi16(x, _mm512_add_epi16(rest, _mm512_add_epi16(rest, rest)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + plane * bytes), _mm512_cvtepi16_epi8(digit));
      x = rest;
    }
    return true;
  }
  if (bits == 1 && bytes == 8) {
    int64_t word;
    std::memcpy(&word, row, sizeof word);
    const __m512i chosen = _mm512_sllv_epi64(_mm512_set1_epi8(1), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
    const __mmask64 set = _mm512_test_epi8_mask(_mm512_set1_epi64(word), chosen);
    _mm512_storeu_si512(out, _mm512_maskz_set1_epi8(set, 1));
    return true;
  }
  if (bits == 2 && bytes == 16) {
    const __m512i all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
    const __m512i planes = _mm512_srlv_epi64(all, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
    _mm512_storeu_si512(out, _mm512_and_si512(planes, _mm512_set1_epi8(3)));
    return true;
  }
  if (bits == 2 && bytes == 32) {
    const __m512i all = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
    const __m512i mask = _mm512_set1_epi8(3);
    const __m512i low = _mm512_srlv_epi64(all, _mm512_setr_epi64(0, 0, 0, 0, 2, 2, 2, 2));
    const __m512i high = _mm512_srlv_epi64(all, _mm512_setr_epi64(4, 4, 4, 4, 6, 6, 6, 6));
    _mm512_storeu_si512(out, _mm512_and_si512(low, mask));
    _mm512_storeu_si512(out + 64, _mm512_and_si512(high, mask));
    return true;
  }
  if (bits == 4 && bytes == 64) {
    const __m512i all = _mm512_loadu_si512(row), mask = _mm512_set1_epi8(15);
    _mm512_storeu_si512(out, _mm512_and_si512(all, mask));
    _mm512_storeu_si512(out + 64, _mm512_and_si512(_mm512_srli_epi64(all, 4), mask));
    return true;
  }
  return false;
}
#else
inline bool expand_at_once(const uint8_t*, int, int64_t, uint8_t*) { return false; }
#endif

// As expand_row, with its slack.
inline void expand_codes(const uint8_t* row, int bits, int64_t channels, uint8_t* out) {
  if (!expand_at_once(row, bits, kv_code_bytes(bits, channels), out)) expand_row(row, bits, channels, out);
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
