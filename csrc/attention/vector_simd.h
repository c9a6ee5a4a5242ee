// The two products of a block of rows with a block of keys on vectors, for the engines of attention that use no tiles.
#pragma once
#include "attention/rows_simd.h"
#include "cpu/tile_simd.h"
#include "cpu/transpose_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

template <class Product>
struct VectorTiles {
  static constexpr int kTileRows = FASTOK_ISA::kRows, kStep = FASTOK_ISA::kCols;  // of keys, or channels of the values
  static constexpr bool kBackground = false;
  static constexpr int kRows = 48, kRowsTogether = kRows, kKeys = 128;
  using Weight = typename Product::Element;  // of a value
  static constexpr int kPair = sizeof(float) / sizeof(Weight), kWeightPitch = kPair * kKeys;
  static_assert(kRows % kTileRows == 0 && kKeys % kStep == 0);

  static int64_t padded(int64_t width) { return round_up(width, kStep); }
  static size_t row_bytes(int64_t width) { return size_t(kRows * width) * sizeof(Weight); }
  static size_t key_bytes(int64_t n, int64_t width) { return size_t(round_up(n, kStep) * width) * sizeof(Weight); }
  static size_t value_bytes(int64_t n, int64_t width) {
    return size_t(round_up(n, kStep) * padded(width)) * sizeof(Weight);
  }

  // out[row][key] of packed rows [panel][word][kTileRows] and packed keys [panel][word][kStep], from `key` on, both in
  // whole tiles.
  static void multiply(const void* rows, int64_t n_rows, const void* keys, int64_t key, int64_t n_keys, int64_t width,
                       float* out, int64_t pitch) {
    const int64_t words = width / kPair;
    for (int64_t i = 0; i < n_rows; i += kTileRows)
      for (int64_t j = 0; j < n_keys; j += kStep)
        multiply_panels<Product>(static_cast<const float*>(rows) + i * words,
                                 static_cast<const float*>(keys) + (key + j) * words, words, out + i * pitch + j,
                                 pitch);
  }

  // out[row][channel] += weight[row][key] * values[key from `key` on][channel], whose words are [keys][padded width].
  static void add_values(const Weight* weight, int64_t n_rows, const void* values, int64_t key, int64_t n_keys,
                         int64_t width, float* out) {
    const float* const v = static_cast<const float*>(values) + key / kPair * width;
    for (int64_t c = 0; c < width; c += kStep)
      for (int64_t i = 0; i < n_rows; i += kTileRows)
        add_values_tile(reinterpret_cast<const float*>(weight) + i * kKeys, v + c, n_keys / kPair, width,
                        out + i * width + c);
  }
  static void add_values_tile(const float* weight, const float* v, int64_t words, int64_t width, float* out) {
    vf acc[kTileRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      acc[i][0] = load(out + i * width);
      acc[i][1] = load(out + i * width + kLanes);
    }
    for (int64_t j = 0; j < words; ++j) {
      const vf v0 = load(v + j * width), v1 = load(v + j * width + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        acc[i][0] = Product::add_product(splat(weight[i * kKeys + j]), v0, acc[i][0]);
        acc[i][1] = Product::add_product(splat(weight[i * kKeys + j]), v1, acc[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      store(out + i * width, acc[i][0]);
      store(out + i * width + kLanes, acc[i][1]);
    }
  }
};

}  // namespace
}  // namespace fastok::FASTOK_ISA
