// Sums of codes times weights, of codes as they lie in a page: four tokens' bytes of a column are a word, of which each
// plane of bits (or each power of three) has the codes of one channel. Integers are halved as in packed_dots_simd.h, so
// sums are those of integer_sums. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "decode/tile_simd.h"
#include "quantize/kv_format.h"

namespace fastok::FASTOK_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr int64_t kColumns = 16, kQuad = 4;  // words of a vector, tokens of a word

// Words of a page's rows, [quad of tokens][vector of 16 columns]; of trits each plane's codes are vectors of their own.
struct Quads {
  const KvPart& part;
  int64_t blocks;  // vectors that the bytes of a row make

  explicit Quads(const KvPart& part_in) : part(part_in), blocks((part.bytes() + kColumns - 1) / kColumns) {}
  bool trits() const { return part.kind == KvKind::trit; }
  int64_t planes() const { return trits() ? 5 : 8 / part.bits; }
  // Of the channels: plane after plane.
  int64_t vectors() const { return planes() * blocks; }
  int64_t bytes() const { return (trits() ? 5 : 1) * blocks * 64; }
};

// Whether the codes of `tokens` whole rows can be summed so, in scratch of so many bytes.
inline bool suits_packed_sums(const KvSide& side, int64_t tokens, int64_t most_bytes) {
  const KvPart& part = side.part[0];
  if (side.n_parts > 1 || side.two_classes || tokens % kQuad != 0) return false;
  // Channels of a group are whole vectors.
  if (side.per_token && (part.bytes() % kColumns != 0 || side.group % kColumns != 0 || part.bits == 0)) return false;
  return tokens / kQuad * Quads(part).bytes() <= most_bytes;
}

// Reads up to kColumns - 1 bytes behind the last row. `ahead`: what is to be fetched on the way, as many bytes.
inline void quads_of(const Quads& quads, const uint8_t* row, int64_t tokens, const uint8_t* ahead, uint8_t* words) {
  const int64_t row_bytes = quads.part.bytes();
  const vi across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const vi within = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const vi third = _mm512_set1_epi16(21846), low = _mm512_set1_epi16(255);
  const auto piece = [&](int64_t t, int64_t c) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + t * row_bytes + c * kColumns));
  };
  const uint8_t* fetched = ahead;
  for (int64_t t = 0; t < tokens; t += kQuad, words += quads.bytes()) {
    for (; fetched < ahead + (t + kQuad) * row_bytes; fetched += 64) __builtin_prefetch(fetched);
    for (int64_t c = 0; c < quads.blocks; ++c) {
      vi x = _mm512_castsi128_si512(piece(t, c));
      x = _mm512_inserti32x4(x, piece(t + 1, c), 1);
      x = _mm512_inserti32x4(x, piece(t + 2, c), 2);
      x = _mm512_inserti32x4(x, piece(t + 3, c), 3);
      x = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(across, x), within);
      if (!quads.trits()) {
        _mm512_store_si512(words + c * 64, x);
        continue;
      }
      for (int64_t plane = 0; plane < 5; ++plane) {  // x / 3 is the upper half of x * 21846 for all bytes
        const vi even = _mm512_mulhi_epu16(_mm512_and_si512(x, low), third);
        const vi odd = _mm512_mulhi_epu16(_mm512_srli_epi16(x, 8), third);
        const vi rest = _mm512_or_si512(even, _mm512_slli_epi16(odd, 8));
        const vi digit = _mm512_sub_epi8(x, _mm512_add_epi8(rest, _mm512_add_epi8(rest, rest)));
        _mm512_store_si512(words + (plane * quads.blocks + c) * 64, digit);
        x = rest;
      }
    }
  }
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void packed_sum_tile(const Quads& quads, const uint8_t* words, int64_t n_quads,
                                                           int64_t first, const int8_t* weights, const float* step,
                                                           float* out, int64_t pitch) {
  const KvPart& part = quads.part;
  vi high[kRows][kVectors], low[kRows][kVectors], shift[kVectors];
  const uint8_t* at[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t vector = first + v;
    at[v] = words + (quads.trits() ? vector : vector % quads.blocks) * 64;
    shift[v] = splat(quads.trits() ? 0 : int32_t(vector / quads.blocks * part.bits));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) high[r][v] = low[r][v] = _mm512_setzero_si512();
  }
  const vi mask = _mm512_set1_epi8(char(quads.trits() ? 3 : (1 << part.bits) - 1));
  for (int64_t q = 0; q < n_quads; ++q, weights += kQuad) {
    vi of_tokens[2 * kRows];
#pragma GCC unroll 8
    for (int i = 0; i < 2 * kRows; ++i) {
      int32_t word;
      std::memcpy(&word, weights + i * kMostChannels, sizeof word);
      of_tokens[i] = splat(word);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const vi codes = _mm512_and_si512(_mm512_srlv_epi32(_mm512_load_si512(at[v]), shift[v]), mask);
      at[v] += quads.bytes();
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        high[r][v] = _mm512_dpbusd_epi32(high[r][v], codes, of_tokens[2 * r]);
        low[r][v] = _mm512_dpbusd_epi32(low[r][v], codes, of_tokens[2 * r + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t plane = (first + v) / quads.blocks, column = (first + v) % quads.blocks * kColumns;
    const int64_t channel = plane * part.bytes() + column, end = (plane + 1) * part.bytes();
    const int64_t count = (end < part.channels ? end : part.channels) - channel;
    const vmask there = vmask(count >= kColumns ? 0xffff : (1 << (count > 0 ? count : 0)) - 1);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      float* const to = out + r * pitch + channel;
      const vf sum = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r][v], 8), low[r][v]));
      _mm512_mask_storeu_ps(to, there, fma(sum, splat(step[r]), _mm512_maskz_loadu_ps(there, to)));
    }
  }
}

// out[row * pitch + channel] += step[row] * sum over tokens of weight * code, of the channels that the vectors from
// `first` on have; weights as split_bytes has them.
inline void packed_sums(const Quads& quads, const uint8_t* words, int64_t tokens, int64_t first, int64_t vectors,
                        const int8_t* weights, const float* step, int64_t rows, float* out, int64_t pitch) {
  by_rows(rows, [&](auto some, int64_t r) {
    constexpr int kRows = some.count, kVectors = kRows == 4 ? 2 : 4;
    const int8_t* const of_rows = weights + 2 * r * kMostChannels;
    const auto tile = [&](auto count, int64_t v) {
      packed_sum_tile<kRows, count.count>(quads, words, tokens / kQuad, v, of_rows, step + r, out + r * pitch, pitch);
    };
    int64_t v = first;
    for (; v + kVectors <= first + vectors; v += kVectors) tile(Rows<kVectors>(), v);
    for (; v < first + vectors; ++v) tile(Rows<1>(), v);
  });
}
#else
// Never used.
struct Quads {
  int64_t n = 0;

  explicit Quads(const KvPart&) {}
  int64_t vectors() const { return n; }
  int64_t bytes() const { return n; }
};
inline bool suits_packed_sums(const KvSide&, int64_t, int64_t) { return false; }
inline void quads_of(const Quads&, const uint8_t*, int64_t, const uint8_t*, uint8_t*) {}
inline void packed_sums(const Quads&, const uint8_t*, int64_t, int64_t, int64_t, const int8_t*, const float*, int64_t,
                        float*, int64_t) {}
#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA
