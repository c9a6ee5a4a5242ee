// Attention's bf16 engine, on AMX tiles: packing, and the two products of a block of rows with a block of keys.
#pragma once
#include "attention/bf16_simd.h"
#include "cpu/amx_simd.h"

#if defined(FASTOK_AMX)

namespace fastok::FASTOK_ISA {
namespace {

struct Bf16 {
  static constexpr int kTile = 16, kDepth = 32, kStep = 32, kBlock = kTile * kDepth;
  static constexpr int kTileRows = 32;
  static constexpr int kRows = 64, kRowsTogether = 32, kKeys = 128;
  static_assert(kRows % kTileRows == 0 && kKeys % kStep == 0);
  static constexpr bool kScaledRows = false;
  using Weight = bf16;
  static constexpr int kWeightPitch = 2 * kKeys;

  static int64_t padded(int64_t width) { return round_up(width, 32); }
  static size_t row_bytes(int64_t width) { return size_t(kRows * padded(width)) * sizeof(bf16); }
  static size_t key_bytes(int64_t n, int64_t width) {
    return size_t(round_up(n, kStep) * padded(width)) * sizeof(bf16);
  }
  static size_t value_bytes(int64_t n, int64_t width) { return key_bytes(n, width); }

  // [row][padded width]
  static void pack_rows(const AttentionHead& head, const RowList& rows, void* out_bytes) {
    bf16* const out = static_cast<bf16*>(out_bytes);
    const int64_t width = head.q.width, pitch = padded(width);
    for (int64_t i = 0; i < round_up(rows.count, kTileRows); ++i) {
      bf16* const row = out + i * pitch;
      if (i + kAhead < rows.count) prefetch_row(head.q, rows.at(i + kAhead));
      const bf16* const from =
          static_cast<const bf16*>(head.q.data) + (i < rows.count ? rows.at(i) : 0) * head.q.stride;
      for (int64_t d = 0; d < pitch; d += kDepth) {
        const __mmask32 wanted = i < rows.count ? first_lanes(width - d) : 0;
        _mm512_storeu_si512(row + d, _mm512_maskz_loadu_epi16(wanted, from + d));
      }
    }
  }
  // [16 keys][depth block][pair of depths][key][2]
  static void pack_keys(const HeadRows& k, Dtype, int64_t begin, int64_t end, void* out) {
    const int64_t words = padded(k.width) / 2;
    for (int64_t j = 0; j < round_up(end - begin, kStep); j += kTile)
      transpose_pairs<kTile>(k, begin + j, end, words, static_cast<float*>(out) + j * words);
  }
  // [32 keys][16 channels][pair of keys][channel][2]
  static void pack_values(const HeadRows& v, Dtype, int64_t begin, int64_t end, void* out) {
    const int64_t channels = padded(v.width);
    for (int64_t key = 0; key < round_up(end - begin, kStep); key += 2) {
      prefetch_row(v, begin + key + kAhead);
      prefetch_row(v, begin + key + kAhead + 1);
      int32_t* const at = static_cast<int32_t*>(out) + (key / kDepth * channels * kDepth + key % kDepth * kTile) / 2;
      for (int64_t c = 0; c < channels; c += kTile)
        store(at + c / kTile * (kBlock / 2), pair_values(v, begin + key, end, c));
    }
  }

  static void multiply(const void* rows, int64_t n_rows, const void* keys, int64_t key, int64_t n_keys, int64_t width,
                       float* out, int64_t pitch) {
    const int64_t depth = padded(width), blocks = depth / kDepth;
    const size_t row_pitch = size_t(depth) * sizeof(bf16), out_pitch = size_t(pitch) * sizeof(float);
    for (int64_t j = 0; j < n_keys; j += kStep) {
      const bf16* const b0 = static_cast<const bf16*>(keys) + (key + j) / kTile * blocks * kBlock;
      const bf16* const b1 = b0 + blocks * kBlock;
      for (int64_t i = 0; i < n_rows; i += kTileRows) {
        const bf16* const a0 = static_cast<const bf16*>(rows) + i * depth;
        const bf16* const a1 = a0 + kTile * depth;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t block = 0; block < blocks; ++block) {
          _tile_loadd(4, a0 + block * kDepth, row_pitch);
          _tile_loadd(6, b0 + block * kBlock, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b1 + block * kBlock, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a1 + block * kDepth, row_pitch);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        store_tiles(out + i * pitch + j, pitch, out_pitch);
      }
    }
  }
  static void store_tiles(float* out, int64_t pitch, size_t pitch_bytes) {
    _tile_stored(0, out, pitch_bytes);
    _tile_stored(1, out + kTile, pitch_bytes);
    _tile_stored(2, out + kTile * pitch, pitch_bytes);
    _tile_stored(3, out + kTile * pitch + kTile, pitch_bytes);
  }

  // out[i][c] += the sum over `depth` of a[i][j] * b[j][c]; b is [32 summands][b_width / 16][pair][16 columns][2].
  static void add_product(const bf16* a, int64_t a_pitch, int64_t n_rows, const bf16* b, int64_t b_width, int64_t depth,
                          int64_t n_columns, float* out, int64_t pitch) {
    const size_t a_bytes = size_t(a_pitch) * sizeof(bf16), out_bytes = size_t(pitch) * sizeof(float);
    for (int64_t c = 0; c < n_columns; c += 2 * kTile) {
      for (int64_t i = 0; i < n_rows; i += kTileRows) {
        const bf16* const a0 = a + i * a_pitch;
        const bf16* const a1 = a0 + kTile * a_pitch;
        const bf16* at = b + c / kTile * kBlock;
        float* const to = out + i * pitch + c;
        _tile_loadd(0, to, out_bytes);
        _tile_loadd(1, to + kTile, out_bytes);
        _tile_loadd(2, to + kTile * pitch, out_bytes);
        _tile_loadd(3, to + kTile * pitch + kTile, out_bytes);
        for (int64_t j = 0; j < depth; j += kDepth, at += b_width / kTile * kBlock) {
          _tile_loadd(4, a0 + j, a_bytes);
          _tile_loadd(6, at, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, at + kBlock, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a1 + j, a_bytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        store_tiles(to, pitch, out_bytes);
      }
    }
  }
  static void add_values(const bf16* weight, int64_t n_rows, const void* values, int64_t key, int64_t n_keys,
                         int64_t width, float* out) {
    add_product(weight, kWeightPitch, n_rows, static_cast<const bf16*>(values) + key * width, width, n_keys, width, out,
                width);
  }
};

}  // namespace
}  // namespace fastok::FASTOK_ISA

#else

namespace fastok::FASTOK_ISA {
namespace {

struct Tiles {};

}  // namespace
}  // namespace fastok::FASTOK_ISA

#endif
