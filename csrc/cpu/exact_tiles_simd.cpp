// Products of tokens' integers by tiles of bytes.
#include "cpu/exact_simd.h"
#include "cpu/exact_tiles.h"
#include "cpu/tile_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

#if defined(FASTOK_AMX)

// A panel is [depth / 64] blocks of three tiles of 1 KiB, the lowest bytes first. Rows lie in a tile as [16][64],
// columns as [16 quads of depth][16][4], the layout that the tile product wants.
constexpr int kByteDepth = 64, kByteTile = kTile * kByteDepth, kBytes = 3;

inline int64_t byte_blocks(int64_t width) { return (width + kByteDepth - 1) / kByteDepth; }
size_t byte_panel_bytes(int64_t width) { return size_t(byte_blocks(width)) * kBytes * kByteTile; }

// 16 integers' lowest bytes, signed, and what is left of them.
inline __m128i take_byte(__m512i& q) {
  const __m128i bytes = _mm512_cvtepi32_epi8(q);
  q = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
  return bytes;
}

template <bool kColumns>
bool pack_byte_token(const TokenRows& rows, const TokenScale* scales, int64_t token, int place, uint8_t* panel) {
  const bool present = token < rows.count && scales[token].finite;
  const float scale = present ? scales[token].scale : 0.0f;
  __m512i left = _mm512_setzero_si512();
  alignas(64) uint8_t bytes[kBytes][kByteDepth] = {};
  const auto place_bytes = [&](uint8_t* block) {
    for (int part = 0; part < kBytes; ++part) {
      uint8_t* const tile = block + part * kByteTile;
      if constexpr (kColumns) {
        for (int quad = 0; quad < kByteDepth / 4; ++quad)
          std::memcpy(tile + (quad * kTile + place) * 4, bytes[part] + 4 * quad, 4);
      } else {
        std::memcpy(tile + place * kByteDepth, bytes[part], kByteDepth);
      }
    }
  };
  const int64_t blocks = byte_blocks(rows.width);
  if (!present) {
    for (int64_t block = 0; block < blocks; ++block) place_bytes(panel + block * kBytes * kByteTile);
    return true;
  }
  with_row(rows, token, [&](const auto* x) {
    for_steps(x, rows.width, [&](int64_t d, const vf* part) {
      const int half = int(d % kByteDepth);
      for (int i = 0; i < kStepVectors; ++i) {
        __m512i q = _mm512_cvtps_epi32(part[i] * splat(scale));  // to nearest, halves to even
        for (int e = 0; e < kBytes; ++e)
          _mm_store_si128(reinterpret_cast<__m128i*>(bytes[e] + half + i * kLanes), take_byte(q));
        left = _mm512_or_si512(left, q);
      }
      const bool last = d + kStep >= rows.width;
      if (half == 0 && !last) return;
      if (half == 0)
        for (int e = 0; e < kBytes; ++e) std::memset(bytes[e] + kStep, 0, kStep);
      place_bytes(panel + d / kByteDepth * kBytes * kByteTile);
    });
  });
  return _mm512_test_epi32_mask(left, left) == 0;
}

template <bool kColumns>
bool pack_byte_panel(const TokenRows& rows, const TokenScale* scales, int64_t first, void* out) {
  bool fits = true;
  for (int i = 0; i < kTile; ++i)
    fits = pack_byte_token<kColumns>(rows, scales, first + i, i, static_cast<uint8_t*>(out)) && fits;
  return fits;
}

void end_byte_tiles() { _tile_release(); }

// Tiles 0 to 4 sum the products of bytes whose places sum to 0 to 4, in an order that leaves each time until it is
// added to again.
__attribute__((target("amx-int8"))) void tile_cosines(const void* row_panel, const void* col_panel, int64_t width,
                                                      const double* row_norms, const double* col_norms, float* out) {
  const auto *a = static_cast<const uint8_t*>(row_panel), *b = static_cast<const uint8_t*>(col_panel);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  for (int64_t block = 0; block < byte_blocks(width); ++block, a += kBytes * kByteTile, b += kBytes * kByteTile) {
    _tile_loadd(5, a, 64);
    _tile_loadd(6, b + 2 * kByteTile, 64);
    _tile_dpbssd(2, 5, 6);
    _tile_loadd(7, b + kByteTile, 64);
    _tile_dpbssd(1, 5, 7);
    _tile_loadd(5, a + kByteTile, 64);
    _tile_dpbssd(3, 5, 6);
    _tile_dpbssd(2, 5, 7);
    _tile_loadd(5, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbssd(0, 5, 6);
    _tile_loadd(5, a + kByteTile, 64);
    _tile_dpbssd(1, 5, 6);
    _tile_loadd(5, a + 2 * kByteTile, 64);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    _tile_loadd(6, b + 2 * kByteTile, 64);
    _tile_dpbssd(4, 5, 6);
  }
  alignas(64) int32_t sums[5][kTile * kTile];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  _tile_stored(4, sums[4], 64);
  for (int i = 0; i < kTile; ++i) {
    for (int j = 0; j < kTile; j += kWide) {
      vd product = splat_wide(0.0);
      for (int place = 4; place >= 0; --place) {
        const auto* const at = reinterpret_cast<const __m256i*>(sums[place] + i * kTile + j);
        product = fma_wide(product, splat_wide(256.0), _mm512_cvtepi32_pd(_mm256_load_si256(at)));
      }
      const vd cosine = product / (splat_wide(row_norms[i]) * load_wide(col_norms + j));
      _mm256_storeu_ps(out + i * kTile + j, _mm512_cvtpd_ps(cosine));
    }
  }
}

// Three products of bytes per channel in a 32-bit sum, 2^14 each.
constexpr ExactTiles kExactTiles = {
    1 << 15,        byte_panel_bytes, pack_byte_panel<false>, pack_byte_panel<true>, configure_tiles,
    end_byte_tiles, tile_cosines};

#endif

}  // namespace

extern const ExactTileKernels exact_tile_kernels;
const ExactTileKernels exact_tile_kernels = {
#if defined(FASTOK_AMX)
    &kExactTiles,
#else
    nullptr,
#endif
};

}  // namespace fastok::FASTOK_ISA
