// Sums of codes times weights, of codes as they lie in a page: four tokens' bytes of a column are a word, of which each
// plane of bits has the codes of one channel; of trits, bytes are taken apart into a word for each channel. Integers
// are halved as in packed_dots_simd.h, so sums are those of integer_sums. See cpu/dispatch.h for the rule about
// linkage.
#pragma once
#include "decode/packed_dots_simd.h"
#include "quantize/kv_format.h"

namespace fastok::FASTOK_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr int64_t kColumns = 16, kQuad = 4;  // words of a vector, tokens of a word

// Words of a page's rows, [quad of tokens][vector of 16 columns], or of trits [quad of tokens][channel].
struct Quads {
  const KvPart& part;
  bool trits;
  int64_t row_bytes;
  int64_t blocks;  // vectors that the bytes of a row make

  explicit Quads(const KvPart& part_in)
      : part(part_in), trits(part.bits == 0), row_bytes(part.bytes()), blocks((row_bytes + kColumns - 1) / kColumns) {}
  // Of the channels: in order, or plane after plane.
  int64_t vectors() const { return trits ? (part.channels + kColumns - 1) / kColumns : 8 / part.bits * blocks; }
  int64_t bytes() const { return (trits ? vectors() : blocks) * 64; }
  // Of so many quads, with what is written behind the last.
  int64_t bytes_of(int64_t quads) const {
    return quads * bytes() + (trits ? ((kTrits - 1) * row_bytes + blocks * kColumns) * kQuad - bytes() : 0);
  }

  static constexpr int64_t kTrits = 5;  // of a byte
};

struct TritTables {
  alignas(64) uint8_t upper[256] = {}, ninefold[64] = {}, trit[3][64] = {};

  constexpr TritTables() {
    for (int i = 0; i < 256; ++i) upper[i] = uint8_t(i / 9);
    for (int i = 0; i < 64; ++i) {
      ninefold[i] = uint8_t(9 * i);
      for (int place = 0, x = i; place < 3; ++place, x /= 3) trit[place][i] = uint8_t(x % 3);
    }
  }
};
constexpr TritTables kTritTables;

// Of each byte of a quad's word, its column; and where it is in four pieces of a column's vector, one after the other.
struct QuadTables {
  alignas(64) uint8_t column[64] = {}, piece[64] = {};

  constexpr QuadTables() {
    for (int i = 0; i < 64; ++i) {
      column[i] = uint8_t(i / kQuad);
      piece[i] = uint8_t(i % kQuad * kColumns + i / kQuad);
    }
  }
};
constexpr QuadTables kQuadTables;

// The trits of 64 bytes, by each byte's upper three and lower two.
inline __attribute__((always_inline)) void take_apart(vi x, vi (&trit)[Quads::kTrits]) {
  const TritTables& of = kTritTables;
  const auto table = [](const uint8_t* p) { return _mm512_load_si512(p); };
  const vi below = _mm512_permutex2var_epi8(table(of.upper), x, table(of.upper + 64));
  const vi above = _mm512_permutex2var_epi8(table(of.upper + 128), x, table(of.upper + 192));
  const vi upper = _mm512_mask_mov_epi8(below, _mm512_movepi8_mask(x), above);
  const vi lower = _mm512_sub_epi8(x, _mm512_permutexvar_epi8(upper, table(of.ninefold)));
#pragma GCC unroll 5
  for (int i = 0; i < Quads::kTrits; ++i)
    trit[i] = _mm512_permutexvar_epi8(i < 2 ? lower : upper, table(of.trit[i < 2 ? i : i - 2]));
}

// Whether the codes of `tokens` whole rows can be summed so, in scratch of so many bytes.
inline bool suits_packed_sums(const KvSide& side, int64_t tokens, int64_t most_bytes) {
  const KvPart& part = side.part[0];
  const Quads quads(part);
  if (side.n_parts > 1 || side.two_classes || tokens % kQuad != 0) return false;
  // Channels of a group are whole vectors.
  if (side.per_token && ((!quads.trits && quads.row_bytes % kColumns != 0) || side.group % kColumns != 0)) return false;
  return quads.bytes_of(tokens / kQuad) <= most_bytes;
}

// Words of all quads of `tokens` rows from words_at(quad, vector of columns). Fetches half of what is ahead.
template <bool kTrits, class WordsAt>
inline __attribute__((always_inline)) void store_quads(const Quads& quads, int64_t tokens, FetchedAhead& ahead,
                                                       uint8_t* words, const WordsAt& words_at) {
  const uint8_t* const first = ahead.line;
  const int64_t each = (ahead.end - ahead.line) / 2 / (tokens / kQuad);
  for (int64_t quad = 0; quad < tokens / kQuad; ++quad, words += quads.bytes()) {
    ahead.fetch(first + (quad + 1) * each);
    // What is written behind a plane of trits belongs to the first vector of the next one, which comes later.
    for (int64_t c = quads.blocks - 1; c >= 0; --c) {
      const vi x = words_at(quad, c);
      if constexpr (!kTrits) {
        _mm512_store_si512(words + c * 64, x);
        continue;
      }
      vi trit[Quads::kTrits];
      take_apart(x, trit);
#pragma GCC unroll 5
      for (int plane = 0; plane < Quads::kTrits; ++plane)
        _mm512_storeu_si512(words + (plane * quads.row_bytes + c * kColumns) * kQuad, trit[plane]);
    }
  }
}

// Reads up to kColumns - 1 bytes behind the last row.
template <bool kTrits>
inline void quads_in(const Quads& quads, const uint8_t* row, int64_t tokens, FetchedAhead& ahead, uint8_t* words) {
  const int64_t row_bytes = quads.row_bytes, quad_bytes = kQuad * row_bytes;
  const vi columns = _mm512_load_si512(kQuadTables.column);
  // Trits are faster from pieces.
  if (!kTrits && quad_bytes >= 64 && quad_bytes <= 128) {
    // All of a quad in two vectors: its first 64 bytes, and its last.
    const vi tokens_at = splat(int32_t(0x03020100 * row_bytes)), last = _mm512_set1_epi8(char(128 - quad_bytes));
    vi from[2];
    for (int c = 0; c < 2; ++c) {
      const vi byte = _mm512_add_epi8(_mm512_add_epi8(columns, _mm512_set1_epi8(char(c * kColumns))), tokens_at);
      from[c] = _mm512_mask_add_epi8(byte, _mm512_cmpge_epu8_mask(byte, _mm512_set1_epi8(64)), byte, last);
    }
    return store_quads<kTrits>(quads, tokens, ahead, words, [&](int64_t quad, int64_t c) {
      const uint8_t* const p = row + quad * quad_bytes;
      return _mm512_permutex2var_epi8(_mm512_loadu_si512(p), from[c], _mm512_loadu_si512(p + quad_bytes - 64));
    });
  }
  const vi from = _mm512_load_si512(kQuadTables.piece);
  store_quads<kTrits>(quads, tokens, ahead, words, [&](int64_t quad, int64_t c) {
    const auto piece = [&](int64_t i) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + (quad * kQuad + i) * row_bytes + c * kColumns));
    };
    vi x = _mm512_castsi128_si512(piece(0));
    x = _mm512_inserti32x4(x, piece(1), 1);
    x = _mm512_inserti32x4(x, piece(2), 2);
    x = _mm512_inserti32x4(x, piece(3), 3);
    return _mm512_permutexvar_epi8(from, x);
  });
}

inline void quads_of(const Quads& quads, const uint8_t* row, int64_t tokens, FetchedAhead& ahead, uint8_t* words) {
  return quads.trits ? quads_in<true>(quads, row, tokens, ahead, words)
                     : quads_in<false>(quads, row, tokens, ahead, words);
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void packed_sum_tile(const Quads& quads, const uint8_t* words, int64_t n_quads,
                                                           int64_t first, const int8_t* weights, const float* step,
                                                           float* out, int64_t pitch, FetchedAhead& ahead) {
  const KvPart& part = quads.part;
  vi high[kRows][kVectors], low[kRows][kVectors], shift[kVectors];
  const uint8_t* at[kVectors];
  const int64_t in_plane = quads.trits ? quads.vectors() : quads.blocks;
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t vector = first + v;
    at[v] = words + vector % in_plane * 64;
    shift[v] = splat(int32_t(vector / in_plane * part.bits));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) high[r][v] = low[r][v] = _mm512_setzero_si512();
  }
  const vi mask = _mm512_set1_epi8(quads.trits ? 3 : char((1 << part.bits) - 1));
  for (int64_t q = 0; q < n_quads; ++q, weights += kQuad) {
    ahead.fetch_line();
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
        asm("" : "+v"(high[r][v]), "+v"(low[r][v]));  // GCC would copy them back and forth at every turn
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int64_t plane = (first + v) / in_plane, column = (first + v) % in_plane * kColumns;
    const int64_t width = quads.trits ? part.channels : quads.row_bytes;
    const int64_t channel = plane * width + column, end = (plane + 1) * width;
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
// `first` on have; weights as to_halves has them.
inline void packed_sums(const Quads& quads, const uint8_t* words, int64_t tokens, int64_t first, int64_t vectors,
                        const int8_t* weights, const float* step, int64_t rows, float* out, int64_t pitch,
                        FetchedAhead& ahead) {
  by_rows(rows, [&](auto some, int64_t r) {
    constexpr int kRows = some.count, kVectors = kRows == 4 ? 2 : 4;
    const int8_t* const of_rows = weights + 2 * r * kMostChannels;
    const auto tile = [&](auto count, int64_t v) {
      packed_sum_tile<kRows, count.count>(quads, words, tokens / kQuad, v, of_rows, step + r, out + r * pitch, pitch,
                                          ahead);
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
inline void quads_of(const Quads&, const uint8_t*, int64_t, FetchedAhead&, uint8_t*) {}
inline void packed_sums(const Quads&, const uint8_t*, int64_t, int64_t, int64_t, const int8_t*, const float*, int64_t,
                        float*, int64_t, FetchedAhead&) {}
#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA
