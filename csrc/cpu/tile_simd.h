// Matrix products of packed panels, one register tile at a time: fp32 vectors, and bf16 tiles where the machine has
// AMX. See cpu/dispatch.h for the rule about linkage.
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

// Adds `depth` products, or squared differences, to the sums of a kRows x kCols tile; `a` is [depth][kRows] and `b`
// [depth][kCols].
template <bool kSquares>
inline __attribute__((always_inline)) void accumulate(const float* a, const float* b, int64_t depth,
                                                      vf (&acc)[kRows][2]) {
  for (int64_t d = 0; d < depth; ++d) {
    const vf b0 = load(b + d * kCols), b1 = load(b + d * kCols + kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const vf ai = splat(a[d * kRows + i]);
      if constexpr (kSquares) {
        const vf d0 = ai - b0, d1 = ai - b1;
        acc[i][0] = fma(d0, d0, acc[i][0]);
        acc[i][1] = fma(d1, d1, acc[i][1]);
      } else {
        acc[i][0] = fma(ai, b0, acc[i][0]);
        acc[i][1] = fma(ai, b1, acc[i][1]);
      }
    }
  }
}

// All sums of a tile; `consume(i, s0, s1)` gets each row's two vectors.
template <bool kSquares, class Consume>
inline __attribute__((always_inline)) void multiply_panels(const float* a, const float* b, int64_t width,
                                                           const Consume& consume) {
  vf acc[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) acc[i][0] = acc[i][1] = splat(0.0f);
  accumulate<kSquares>(a, b, width, acc);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) consume(i, acc[i][0], acc[i][1]);
}

#if defined(FASTOK_AMX)

// A panel is two tiles of 16 rows or columns, each [depth/32] blocks of 1 KiB.
constexpr int kTile = 16, kDepth = 32, kBlock = kTile * kDepth, kTilePanel = 2 * kTile;

inline int64_t blocks(int64_t width) { return (width + kDepth - 1) / kDepth; }

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

#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA
