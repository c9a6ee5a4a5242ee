// The two products of a block of rows with a block of keys on vectors, for the engines of attention that use no tiles.
#pragma once
#include "attention/rows_simd.h"
#include "cpu/transpose_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// Operands are words, of one fp32 number or of two bf16 numbers that are neighbours along the sum; a product adds to
// `sum` what a row's word makes with a vector of words.
struct Fma {
  using Weight = float;  // of a value
  static vf add_product(float row, vf words, vf sum) { return fma(splat(row), words, sum); }
};
#if defined(__AVX512BF16__)
struct Dot {
  using Weight = bf16;
  static vf add_product(float row, vf words, vf sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(splat(row)), reinterpret_cast<__m512bh>(words));
  }
};
#endif

template <class Product>
struct VectorTiles {
  // A register tile of kTileRows x (2 vectors): accumulators, two columns and one broadcast fill the register file.
#if defined(__AVX512F__)
  static constexpr int kTileRows = 12;
#elif defined(__AVX2__)
  static constexpr int kTileRows = 6;
#else
  static constexpr int kTileRows = 4;
#endif
  static constexpr bool kBackground = false;
  static constexpr int kStep = 2 * kLanes;  // keys, or channels of the values, of a tile
  static constexpr int kRows = 48, kRowsTogether = kRows, kKeys = 128;
  using Weight = typename Product::Weight;
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
        multiply_tile(static_cast<const float*>(rows) + i * words, static_cast<const float*>(keys) + (key + j) * words,
                      words, out + i * pitch + j, pitch);
  }
  static void multiply_tile(const float* a, const float* b, int64_t words, float* out, int64_t pitch) {
    vf acc[kTileRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) acc[i][0] = acc[i][1] = splat(0.0f);
    for (int64_t d = 0; d < words; ++d) {
      const vf b0 = load(b + d * kStep), b1 = load(b + d * kStep + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        acc[i][0] = Product::add_product(a[d * kTileRows + i], b0, acc[i][0]);
        acc[i][1] = Product::add_product(a[d * kTileRows + i], b1, acc[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      store(out + i * pitch, acc[i][0]);
      store(out + i * pitch + kLanes, acc[i][1]);
    }
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
        acc[i][0] = Product::add_product(weight[i * kKeys + j], v0, acc[i][0]);
        acc[i][1] = Product::add_product(weight[i * kKeys + j], v1, acc[i][1]);
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
