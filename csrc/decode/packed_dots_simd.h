// Dot products with codes as they lie in a page: a word of 16 tokens at a time, of which each plane of bits has the
// codes of four neighbouring channels. Integers of 16 bits are 256 * high + low, bytes with a sign; their sums are put
// together before they are rounded, so they are those of integer_dots. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/transpose_simd.h"
#include "decode/tile_simd.h"
#include "quantize/kv_format.h"

namespace fastok::FASTOK_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr bool kPackedDots = true;

// Whether each word of a row has codes of one part only, all of them of channels that there are.
inline bool has_whole_words(const KvSide& side) {
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part[i];
    if (part.bits == 0 || part.bytes() % 4 != 0 || part.channels * part.bits != part.bytes() * 8) return false;
  }
  return true;
}

// Rows of integers as [row][high, low][kMostChannels] bytes; none is above 127 * 256 + 127.
inline void split_bytes(const int16_t* x, int64_t pitch, int64_t rows, int64_t width, int8_t* out) {
  for (int64_t r = 0; r < rows; ++r) {
    int8_t *const high = out + 2 * r * kMostChannels, *const low = high + kMostChannels;
    for (int64_t d = 0; d < width; d += 32) {
      const vi y = _mm512_loadu_si512(x + r * pitch + d);
      const vi h = _mm512_srai_epi16(_mm512_add_epi16(y, _mm512_set1_epi16(128)), 8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + d), _mm512_cvtepi16_epi8(h));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + d),
                          _mm512_cvtepi16_epi8(_mm512_sub_epi16(y, _mm512_slli_epi16(h, 8))));
    }
  }
}

// Words of 16 tokens' rows, of which there are `tokens`: [word][token].
inline void words_of(const uint8_t* row, int64_t row_bytes, int64_t tokens, float* words) {
  for (int64_t byte = 0; byte < row_bytes; byte += 64, words += 256) {
    const int64_t left = (row_bytes - byte) / 4;
    const vmask some = vmask(left >= 16 ? 0xffff : (1 << left) - 1);
    vf x[16];
#pragma GCC unroll 16
    for (int t = 0; t < 16; ++t) x[t] = _mm512_maskz_loadu_ps(t < tokens ? some : vmask(0), row + t * row_bytes + byte);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(words + i * 16, x[i]);
  }
}

template <int kRows>
inline void packed_dots_of(const KvSide& side, const float* words, const int8_t* q, const float* step,
                           const float* bias, float* out, int64_t pitch) {
  vi high[kRows], low[kRows];
  for (int r = 0; r < kRows; ++r) high[r] = low[r] = _mm512_setzero_si512();
  const auto word_at = [](const int8_t* p) {
    int32_t word;
    std::memcpy(&word, p, sizeof word);
    return splat(word);
  };
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part[i];
    const int64_t bytes = part.bytes();
    const vi mask = _mm512_set1_epi8(char((1 << part.bits) - 1));
    for (int64_t byte = 0; byte < bytes; byte += 4, words += 16) {
      vi planes = _mm512_castps_si512(load(words));
      const int8_t* at = q + part.first + byte;
      for (int shift = 0; shift < 8; shift += part.bits, at += bytes) {
        const vi codes = _mm512_and_si512(planes, mask);
        planes = _mm512_srl_epi32(planes, _mm_cvtsi32_si128(part.bits));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          high[r] = _mm512_dpbusd_epi32(high[r], codes, word_at(at + 2 * r * kMostChannels));
          low[r] = _mm512_dpbusd_epi32(low[r], codes, word_at(at + (2 * r + 1) * kMostChannels));
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const vf sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]));
    store(out + r * pitch, fma(sum, splat(step[r]), splat(bias[r])));
  }
}

// out[row * pitch + i] = bias[row] + step[row] * <q[row], codes of token i>, of whole vectors; q as split_bytes has it.
// `ahead`: what is to be fetched on the way, a token's worth at a time.
inline void packed_dots(const KvSide& side, const uint8_t* codes, int64_t n, const int8_t* q, const float* step,
                        const float* bias, int64_t rows, float* out, int64_t pitch, const uint8_t*& ahead) {
  alignas(64) float words[kMostChannels / 4 * 16];
  const int64_t row_bytes = side.row_bytes(true);
  for (int64_t i = 0; i < n; i += 16) {
    for (const uint8_t* const end = ahead + 16 * row_bytes; ahead < end; ahead += 64) __builtin_prefetch(ahead);
    words_of(codes + i * row_bytes, row_bytes, n - i, words);
    by_rows(rows, [&](auto some, int64_t r) {
      packed_dots_of<some.count>(side, words, q + 2 * r * kMostChannels, step + r, bias + r, out + r * pitch + i,
                                 pitch);
    });
  }
}
#else
constexpr bool kPackedDots = false;
// Never called.
inline bool has_whole_words(const KvSide&) { return false; }
inline void split_bytes(const int16_t*, int64_t, int64_t, int64_t, int8_t*) {}
inline void packed_dots(const KvSide&, const uint8_t*, int64_t, const int8_t*, const float*, const float*, int64_t,
                        float*, int64_t, const uint8_t*&) {}
#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA
