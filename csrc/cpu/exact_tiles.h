// Cosines of all pairs of tokens that are the same bits on every backend (python/fastok/reference/k_center.py), where
// the machine multiplies tiles of integers: of a token's integers each is split into three signed bytes, of whose
// products 32-bit sums are exact. What the SIMD core and its callers share; exact_cosines.h calls it. Torch-free.
#pragma once
#include <cstddef>

#include "cpu/dispatch.h"
#include "cpu/exact.h"

namespace fastok {

constexpr int64_t kExactPanel = 16;  // tokens of a packed panel

struct ExactTiles {
  int64_t most_width;  // up to which sums stay exact
  size_t (*panel_bytes)(int64_t width);
  // Tokens first, ..., first + 15; past the last zeros. False if one's integers do not fit into three signed bytes.
  bool (*pack_rows)(const TokenRows&, const TokenScale*, int64_t first, void* out);
  bool (*pack_cols)(const TokenRows&, const TokenScale*, int64_t first, void* out);
  // Called by a thread before and after it multiplies.
  void (*begin)();
  void (*end)();
  // Of each token of a row panel with each of a column panel, to out[16][16].
  void (*cosines)(const void* row_panel, const void* col_panel, int64_t width, const double* row_norms,
                  const double* col_norms, float* out);
};

struct ExactTileKernels {
  const ExactTiles* tiles;  // nullptr without tile instructions
};

FASTOK_DECLARE_KERNELS(ExactTileKernels, exact_tile_kernels)

// The tile kernels that can compare tokens of this width; nullptr if there are none.
inline const ExactTiles* exact_tiles_for(int64_t width) {
  const ExactTiles* const tiles = pick_exact_tile_kernels().tiles;
  return tiles && width <= tiles->most_width ? tiles : nullptr;
}

}  // namespace fastok
