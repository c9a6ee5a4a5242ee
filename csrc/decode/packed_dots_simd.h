// Dot products with codes as they lie in a page: a word of 16 tokens at a time, of which each plane of bits has the
// codes of four neighbouring channels. Integers of 16 bits are 256 * high + low, bytes with a sign; their sums are put
// together before they are rounded, so they are those of integer_dots. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/transpose_simd.h"
#include "decode/integer_simd.h"
#include "quantize/kv_format.h"

namespace fastok::FASTOK_ISA {
namespace {

// What is to be fetched meanwhile: a line at a time, for more at once would stall.
struct FetchedAhead {
  const uint8_t *line, *end;

  void fetch(const uint8_t* until) {
    for (; line < until; line += 64) __builtin_prefetch(line);
  }
  inline __attribute__((always_inline)) void fetch_line() {
    if (line >= end) return;
    __builtin_prefetch(line);
    line += 64;
  }
};

#if defined(__AVX512VNNI__)
constexpr bool kPackedDots = true;

// Of two vectors, every other word and every other byte.
struct Halves {
  alignas(64) uint16_t words[32] = {};
  alignas(64) uint8_t bytes[64] = {};

  constexpr Halves() {
    for (int i = 0; i < 32; ++i) words[i] = uint16_t(2 * i);
    for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(2 * i);
  }
};
constexpr Halves kHalves;

// Whether each word of a row has codes of one part only, all of them of channels that there are.
inline bool has_whole_words(const KvSide& side) {
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part[i];
    if (part.bits == 0 || part.bytes() % 4 != 0 || part.channels * part.bits != part.bytes() * 8) return false;
  }
  return true;
}

// The integers that to_integers makes, as [high, low][kMostChannels] bytes, in whole vectors with zeros behind the
// last.
inline void to_halves(const float* x, int64_t n, const IntegerScale& scale, int8_t* out) {
  const vi words = _mm512_load_si512(kHalves.words), low = _mm512_load_si512(kHalves.bytes);
  const vi high = _mm512_add_epi8(low, _mm512_set1_epi8(1)), half = _mm512_set1_epi16(128);
  const vf inverse = splat(scale.inverse);
  const auto integers = [&](int64_t i) {
    const vf y = i + kLanes <= n ? load(x + i) : i < n ? load_part(x + i, n - i) : splat(0.0f);
    return _mm512_cvtps_epi32(y * inverse);
  };
  for (int64_t i = 0; i < n; i += 4 * kLanes, out += 64) {
    const vi a = _mm512_permutex2var_epi16(integers(i), words, integers(i + kLanes));
    const vi b = _mm512_permutex2var_epi16(integers(i + 2 * kLanes), words, integers(i + 3 * kLanes));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi8(_mm512_add_epi16(a, half), high, _mm512_add_epi16(b, half)));
    _mm512_storeu_si512(out + kMostChannels, _mm512_permutex2var_epi8(a, low, b));
  }
}

// Words of 16 tokens' rows, of which there are `tokens`: [word][token]; of rows of up to eight words, two tokens to a
// vector.
inline void short_words_of(const uint8_t* row, int64_t row_bytes, int64_t tokens, float* words) {
  const __mmask8 some = __mmask8((1 << row_bytes / 4) - 1);
  const auto row_of = [&](int64_t t) {
    return _mm256_maskz_loadu_ps(t < tokens ? some : __mmask8(0), row + t * row_bytes);
  };
  // Of tokens t to t + 3 and t + 8 to t + 11 the words i and 4 + i, four of a word side by side.
  const auto fours = [&](int64_t t, vf(&out)[4]) {
    vf x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) x[i] = _mm512_insertf32x8(_mm512_castps256_ps512(row_of(t + i)), row_of(t + 8 + i), 1);
    const auto wide = [](vf a) { return _mm512_castps_pd(a); };
    const __m512d low[2] = {wide(_mm512_unpacklo_ps(x[0], x[1])), wide(_mm512_unpacklo_ps(x[2], x[3]))};
    const __m512d high[2] = {wide(_mm512_unpackhi_ps(x[0], x[1])), wide(_mm512_unpackhi_ps(x[2], x[3]))};
    out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low[0], low[1]));
    out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low[0], low[1]));
    out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high[0], high[1]));
    out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high[0], high[1]));
  };
  vf near[4], far[4];
  fours(0, near);
  fours(4, far);
  const vi first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
  const vi second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    store(words + i * 16, _mm512_permutex2var_ps(near[i], first, far[i]));
    store(words + (4 + i) * 16, _mm512_permutex2var_ps(near[i], second, far[i]));
  }
}

inline void words_of(const uint8_t* row, int64_t row_bytes, int64_t tokens, float* words) {
  if (row_bytes <= 32) return short_words_of(row, row_bytes, tokens, words);
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

// One plane of a word's codes, times the halves of kRows queries at `q`; `sum` is [row][high, low].
template <int kRows>
inline __attribute__((always_inline)) void add_plane(vi codes, const int8_t* q, vi (&sum)[2 * kRows]) {
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kRows; ++i) {
    int32_t word;
    std::memcpy(&word, q + i * kMostChannels, sizeof word);
    sum[i] = _mm512_dpbusd_epi32(sum[i], codes, splat(word));
  }
}

// The words of one part, whose planes of kBits bits are `bytes` channels apart. Every other plane has sums of its own:
// one after the other into the same would wait for each other.
template <int kRows, int kBits>
inline void add_words(const float* words, int64_t bytes, const int8_t* q, vi (&even)[2 * kRows], vi (&odd)[2 * kRows]) {
  const vi mask = _mm512_set1_epi8(char((1 << kBits) - 1));
  for (int64_t byte = 0; byte < bytes; byte += 4, words += 16, q += 4) {
    const vi planes = _mm512_castps_si512(load(words));
#pragma GCC unroll 8
    for (int plane = 0; plane < 8 / kBits; ++plane) {
      const vi codes = _mm512_and_si512(_mm512_srli_epi32(planes, unsigned(plane * kBits)), mask);
      add_plane<kRows>(codes, q + plane * bytes, plane % 2 ? odd : even);
    }
  }
}

template <int kRows>
inline void packed_dots_of(const KvSide& side, const float* words, const int8_t* q, const float* step,
                           const float* bias, float* out, int64_t pitch) {
  vi even[2 * kRows], odd[2 * kRows];
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kRows; ++i) even[i] = odd[i] = _mm512_setzero_si512();
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part[i];
    const int64_t bytes = part.bytes();
    const int8_t* const of_part = q + part.first;
    if (part.bits == 1) {
      add_words<kRows, 1>(words, bytes, of_part, even, odd);
    } else if (part.bits == 2) {
      add_words<kRows, 2>(words, bytes, of_part, even, odd);
    } else if (part.bits == 4) {
      add_words<kRows, 4>(words, bytes, of_part, even, odd);
    } else {
      add_words<kRows, 8>(words, bytes, of_part, even, odd);
    }
    words += bytes / 4 * 16;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const vi high = _mm512_add_epi32(even[2 * r], odd[2 * r]), low = _mm512_add_epi32(even[2 * r + 1], odd[2 * r + 1]);
    const vf sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
    store(out + r * pitch, fma(sum, splat(step[r]), splat(bias[r])));
  }
}

// out[row * pitch + i] = bias[row] + step[row] * <q[row], codes of token i>, of whole vectors; q as to_halves has it.
// For 16 tokens so many bytes of what is ahead are fetched.
inline void packed_dots(const KvSide& side, const uint8_t* codes, int64_t n, const int8_t* q, const float* step,
                        const float* bias, int64_t rows, float* out, int64_t pitch, FetchedAhead& ahead,
                        int64_t bytes_each) {
  alignas(64) float words[kMostChannels / 4 * 16];
  const int64_t row_bytes = side.row_bytes(true);
  for (int64_t i = 0; i < n; i += 16) {
    ahead.fetch(ahead.line + bytes_each);
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
inline void to_halves(const float*, int64_t, const IntegerScale&, int8_t*) {}
inline void packed_dots(const KvSide&, const uint8_t*, int64_t, const int8_t*, const float*, const float*, int64_t,
                        float*, int64_t, FetchedAhead&, int64_t) {}
#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA
