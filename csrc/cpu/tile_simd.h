// Matrix products of packed panels, one register tile at a time: fp32, and bf16 by AMX tiles or dot products of vectors
// where the machine has them. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/amx_simd.h"
#include "cpu/transpose_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// A register tile of kRows x (2 vectors): accumulators, two columns and one broadcast fill the register file.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX2__)
constexpr int kRows = 6;
#else
constexpr int kRows = 4;
#endif
constexpr int kCols = 2 * kLanes;

// Operands are words, of one fp32 number or of two bf16 numbers that are neighbours along the sum. Each of these adds
// to `sum` what a row's word makes with a vector of words.
struct Fma {
  using Element = float;
  static vf add_product(vf row, vf words, vf sum) { return fma(row, words, sum); }
};
struct SquaredDifference {
  using Element = float;
  static vf add_product(vf row, vf words, vf sum) { return fma(row - words, row - words, sum); }
};
#if defined(__AVX512BF16__)
struct Dot {
  using Element = bf16;
  static vf add_product(vf row, vf words, vf sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(words));
  }
};
#endif

// Adds `words` products to the sums of a kRows x kCols tile; `a` is [words][kRows] and `b` [words][kCols].
template <class Product>
inline __attribute__((always_inline)) void accumulate(const float* a, const float* b, int64_t words,
                                                      vf (&acc)[kRows][2]) {
  for (int64_t d = 0; d < words; ++d) {
    const vf b0 = load(b + d * kCols), b1 = load(b + d * kCols + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const vf ai = splat(a[d * kRows + i]);
      acc[i][0] = Product::add_product(ai, b0, acc[i][0]);
      acc[i][1] = Product::add_product(ai, b1, acc[i][1]);
    }
  }
}

// All sums of a tile; `consume(i, s0, s1)` gets each row's two vectors.
template <class Product, class Consume>
inline __attribute__((always_inline)) void multiply_panels(const float* a, const float* b, int64_t words,
                                                           const Consume& consume) {
  vf acc[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) acc[i][0] = acc[i][1] = splat(0.0f);
  accumulate<Product>(a, b, words, acc);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) consume(i, acc[i][0], acc[i][1]);
}
template <class Product>
inline void multiply_panels(const float* a, const float* b, int64_t words, float* out, int64_t pitch) {
  multiply_panels<Product>(a, b, words, [&](int i, vf s0, vf s1) {
    store(out + i * pitch, s0);
    store(out + i * pitch + kLanes, s1);
  });
}

#if defined(__AVX512BF16__)

// ---- panels of bf16 numbers, whose products are exact and whose sums are fp32 ---------------------------------------

constexpr int kDepth = 32;  // channels of a block, the last of which is filled up with zeros

inline int64_t blocks(int64_t width) { return (width + kDepth - 1) / kDepth; }

#if defined(FASTOK_AMX)

// A panel is two tiles of 16 rows or columns, each [depth/32] blocks of 1 KiB.
constexpr int kTile = 16, kBlock = kTile * kDepth, kTilePanel = 2 * kTile;

// Rows lie in a block as [16][32]; columns as [16 pairs of depth][16][2], the layout that the tile product wants.
template <bool kColumns>
inline void place_depth(const bf16 (&depth)[kDepth], int i, bf16* block) {
  if constexpr (kColumns) {
    for (int pair = 0; pair < kDepth / 2; ++pair)
      std::memcpy(block + (pair * kTile + i) * 2, depth + 2 * pair, 2 * sizeof(bf16));
  } else {
    std::memcpy(block + i * kDepth, depth, sizeof depth);
  }
}

// All rows or columns of a block.
template <bool kColumns>
inline void place_tile(const bf16 (&depth)[kTile][kDepth], bf16* block) {
  if constexpr (kColumns) {
    vf pair[kTile];
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) pair[i] = load(reinterpret_cast<const float*>(depth[i]));
    transpose(pair);
#pragma GCC unroll 16
    for (int i = 0; i < kTile; ++i) store(reinterpret_cast<float*>(block + i * kDepth), pair[i]);
  } else {
    std::memcpy(block, depth, sizeof depth);
  }
}

inline void store_tiles(float* out, int64_t pitch) {
  const size_t bytes = size_t(pitch) * sizeof(float);
  _tile_stored(0, out, bytes);
  _tile_stored(1, out + kTile, bytes);
  _tile_stored(2, out + kTile * pitch, bytes);
  _tile_stored(3, out + kTile * pitch + kTile, bytes);
}

// Products of the rows of panel `a` with the columns of panel `b`, fp32 sums.
inline void multiply_panels(const bf16* a, const bf16* b, int64_t n_blocks, float* out, int64_t pitch) {
  const bf16 *const a1 = a + n_blocks * kBlock, *const b1 = b + n_blocks * kBlock;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t block = 0; block < n_blocks; ++block) {
    _tile_loadd(4, a + block * kBlock, 64);
    _tile_loadd(6, b + block * kBlock, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1 + block * kBlock, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1 + block * kBlock, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_tiles(out, pitch);
}

// The same of panels that are sums of two, but for the products of both lesser ones.
inline void multiply_split(const bf16* a, const bf16* a_rest, const bf16* b, const bf16* b_rest, int64_t n_blocks,
                           float* out, int64_t pitch) {
  const int64_t second = n_blocks * kBlock;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t at = 0; at < second; at += kBlock) {
    _tile_loadd(4, a + at, 64);
    _tile_loadd(6, b_rest + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b_rest + second + at, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + second + at, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(6, b + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + second + at, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_loadd(4, a_rest + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a_rest + second + at, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_tiles(out, pitch);
}

struct Bf16Panels {
  static constexpr int kRows = kTilePanel, kCols = kTilePanel;

  static size_t bytes(int64_t width, int panel) { return size_t(blocks(width) * kDepth * panel) * sizeof(bf16); }
  // A block of row or column i.
  template <bool kColumns>
  static void place(const bf16 (&depth)[kDepth], int i, int64_t block, int64_t n_blocks, bf16* panel) {
    place_depth<kColumns>(depth, i % kTile, panel + (i / kTile * n_blocks + block) * kBlock);
  }
  // Called by a thread before and after it multiplies.
  static void begin() { configure_tiles(); }
  static void end() { _tile_release(); }
  static void multiply(const void* a, const void* b, int64_t n_blocks, float* out, int64_t pitch) {
    multiply_panels(static_cast<const bf16*>(a), static_cast<const bf16*>(b), n_blocks, out, pitch);
  }
};

#else

// A panel is [pairs of channels][rows or columns].
struct Bf16Panels {
  static constexpr int kRows = FASTOK_ISA::kRows, kCols = FASTOK_ISA::kCols;

  static size_t bytes(int64_t width, int panel) { return size_t(blocks(width) * kDepth * panel) * sizeof(bf16); }
  template <bool kColumns>
  static void place(const bf16 (&depth)[kDepth], int i, int64_t block, int64_t, bf16* panel) {
    constexpr int kPanel = kColumns ? kCols : kRows;
    for (int pair = 0; pair < kDepth / 2; ++pair)
      std::memcpy(panel + ((block * kDepth / 2 + pair) * kPanel + i) * 2, depth + 2 * pair, 2 * sizeof(bf16));
  }
  static void begin() {}
  static void end() {}
  static void multiply(const void* a, const void* b, int64_t n_blocks, float* out, int64_t pitch) {
    multiply_panels<Dot>(static_cast<const float*>(a), static_cast<const float*>(b), n_blocks * kDepth / 2, out, pitch);
  }
};

#endif
#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA
