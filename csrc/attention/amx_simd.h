// Attention's bf16 engine, on AMX tiles: packing, and the two products of a block of rows with a block of keys.
#pragma once
#include "attention/rows_simd.h"

#if defined(__AMX_BF16__)
#define FASTOK_AMX 1

namespace fastok::FASTOK_ISA {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Scores of bf16 products are exact up to fp32 summation; weights of values are rounded to bf16.
struct Bf16 {
  static constexpr int kTile = 16, kDepth = 32, kStep = 32, kBlock = kTile * kDepth;
  static constexpr int kTileRows = 32;
  static constexpr int kRows = 32, kKeys = 640;
  static constexpr bool kScaledRows = false;
  using Weight = bf16;

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
      std::memset(row, 0, size_t(pitch) * sizeof(bf16));
      if (i < rows.count)
        std::memcpy(row, static_cast<const bf16*>(head.q.data) + rows.at(i) * head.q.stride,
                    size_t(width) * sizeof(bf16));
    }
  }
  // [16 keys][depth block][pair of depths][key][2]
  static void pack_keys(const HeadRows& k, Dtype, int64_t begin, int64_t end, void* out_bytes) {
    uint32_t* const out = static_cast<uint32_t*>(out_bytes);
    const int64_t blocks = padded(k.width) / kDepth;
    alignas(64) uint32_t row[256 / 2];
    for (int64_t j = 0; j < round_up(end - begin, kStep); ++j) {
      prefetch_row(k, begin + j + kAhead);
      std::memset(row, 0, size_t(blocks) * kDepth * sizeof(bf16));
      if (begin + j < end)
        std::memcpy(row, static_cast<const bf16*>(k.data) + (begin + j) * k.stride, size_t(k.width) * sizeof(bf16));
      uint32_t* const column = out + j / kTile * blocks * (kBlock / 2) + j % kTile;
      for (int64_t pair = 0; pair < blocks * kDepth / 2; ++pair) column[pair * kTile] = row[pair];
    }
  }
  // [16 channels][32 keys][pair of keys][channel][2]
  static void pack_values(const HeadRows& v, Dtype, int64_t begin, int64_t end, void* out_bytes) {
    bf16* const out = static_cast<bf16*>(out_bytes);
    const int64_t n = round_up(end - begin, kStep), channels = padded(v.width);
    // Two keys at a time, whose elements lie side by side.
    alignas(64) uint16_t rows[2][256];
    std::memset(rows, 0, sizeof rows);
    for (int64_t key = 0; key < n; key += 2) {
      for (int i = 0; i < 2; ++i) {
        const int64_t j = begin + key + i;
        prefetch_row(v, j + kAhead);
        if (j < end) {
          std::memcpy(rows[i], static_cast<const bf16*>(v.data) + j * v.stride, size_t(v.width) * sizeof(bf16));
        } else {
          std::memset(rows[i], 0, sizeof rows[i]);
        }
      }
      bf16* const at = out + key / kDepth * kBlock + key % kDepth / 2 * kTile * 2;
      for (int64_t c = 0; c < channels; c += kTile) {
        uint32_t pairs[kTile];
        for (int i = 0; i < kTile; ++i) pairs[i] = rows[0][c + i] | uint32_t(rows[1][c + i]) << 16;
        std::memcpy(at + c / kTile * (n / kDepth) * kBlock, pairs, sizeof pairs);
      }
    }
  }

  static void multiply(const void* rows, int64_t n_rows, const void* keys, int64_t key, int64_t n_keys, int64_t width,
                       float* out, int64_t pitch) {
    const int64_t depth = padded(width), blocks = depth / kDepth;
    const size_t row_pitch = size_t(depth) * sizeof(bf16), out_pitch = size_t(pitch) * sizeof(float);
    for (int64_t i = 0; i < n_rows; i += kTileRows) {
      const bf16* const a0 = static_cast<const bf16*>(rows) + i * depth;
      const bf16* const a1 = a0 + kTile * depth;
      for (int64_t j = 0; j < n_keys; j += kStep) {
        const bf16* const b0 = static_cast<const bf16*>(keys) + (key + j) / kTile * blocks * kBlock;
        const bf16* const b1 = b0 + blocks * kBlock;
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

  static void add_values(const bf16* weight, int64_t n_rows, const void* values, int64_t n_packed, int64_t key,
                         int64_t n_keys, int64_t width, float* out) {
    const size_t out_pitch = size_t(width) * sizeof(float);
    constexpr size_t weight_pitch = kKeys * sizeof(bf16);
    for (int64_t c = 0; c < width; c += 2 * kTile) {
      const bf16* const b0 =
          static_cast<const bf16*>(values) + (c / kTile * (n_packed / kDepth) + key / kDepth) * kBlock;
      const bf16* const b1 = b0 + n_packed / kDepth * kBlock;
      for (int64_t i = 0; i < n_rows; i += kTileRows) {
        float* const to = out + i * width + c;
        _tile_loadd(0, to, out_pitch);
        _tile_loadd(1, to + kTile, out_pitch);
        _tile_loadd(2, to + kTile * width, out_pitch);
        _tile_loadd(3, to + kTile * width + kTile, out_pitch);
        for (int64_t block = 0; block < n_keys / kDepth; ++block) {
          _tile_loadd(4, weight + i * kKeys + block * kDepth, weight_pitch);
          _tile_loadd(6, b0 + block * kBlock, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b1 + block * kBlock, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, weight + (i + kTile) * kKeys + block * kDepth, weight_pitch);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        store_tiles(to, width, out_pitch);
      }
    }
  }
  static bf16* weights(float*, void* scratch) { return static_cast<bf16*>(scratch); }
};

}  // namespace
}  // namespace fastok::FASTOK_ISA

#endif
