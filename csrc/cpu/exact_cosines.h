// Cosines of all pairs of tokens by tile products (exact_tiles.h), shared out over the threads.
#pragma once
#include <limits>
#include <vector>

#include "cpu/exact_tiles.h"
#include "cpu/scratch.h"

namespace fastok {

// Norms, padded to whole panels; NaN of tokens that are not finite.
inline std::vector<double> panel_norms(const TokenRows& tokens, const TokenScale* scales) {
  std::vector<double> norms(size_t((tokens.count + kExactPanel - 1) / kExactPanel * kExactPanel), 1.0);
  for (int64_t i = 0; i < tokens.count; ++i)
    norms[i] = scales[i].finite ? scales[i].norm : std::numeric_limits<double>::quiet_NaN();
  return norms;
}

// To out[rows.count][pitch], NaN where a token is not finite. False, and nothing written, if the tokens' integers do
// not fit.
inline bool exact_cosines(const ExactTiles& tiles, const TokenRows& rows, const TokenScale* row_scales,
                          const TokenRows& cols, const TokenScale* col_scales, float* out, int64_t pitch) {
  const bool symmetric = rows.data == cols.data && rows.stride == cols.stride && rows.count == cols.count;
  const size_t bytes = tiles.panel_bytes(rows.width);
  const int64_t row_panels = (rows.count + kExactPanel - 1) / kExactPanel;
  const int64_t col_panels = (cols.count + kExactPanel - 1) / kExactPanel;
  const Scratch packed_rows = allocate(size_t(row_panels) * bytes), packed_cols = allocate(size_t(col_panels) * bytes);
  std::atomic<bool> fits{true};
  share_out(row_panels + col_panels, [&](int64_t, int64_t task) {
    const int64_t c = task - row_panels;
    const bool fitted =
        c < 0 ? tiles.pack_rows(rows, row_scales, task * kExactPanel, packed_rows.get() + size_t(task) * bytes)
              : tiles.pack_cols(cols, col_scales, c * kExactPanel, packed_cols.get() + size_t(c) * bytes);
    if (!fitted) fits.store(false, std::memory_order_relaxed);
  });
  if (!fits.load()) return false;

  const std::vector<double> row_norms = panel_norms(rows, row_scales), col_norms = panel_norms(cols, col_scales);
  // Row panels that fit the second-level cache with a column panel, and enough groups of them to share out.
  const int64_t fitting = int64_t((1 << 20) / (bytes + 1)), sharing = row_panels / (8 * workers());
  const int64_t group = std::clamp<int64_t>(std::min(fitting, sharing), 1, 8);
  share_out((row_panels + group - 1) / group, [&](int64_t, int64_t task) {
    const int64_t first = task * group, last = std::min(first + group, row_panels);
    alignas(64) float block[kExactPanel * kExactPanel];
    tiles.begin();
    for (int64_t c = symmetric ? first : 0; c < col_panels; ++c) {
      for (int64_t p = first; p < (symmetric ? std::min(last, c + 1) : last); ++p) {
        const int64_t row = p * kExactPanel, col = c * kExactPanel;
        tiles.cosines(packed_rows.get() + size_t(p) * bytes, packed_cols.get() + size_t(c) * bytes, rows.width,
                      &row_norms[row], &col_norms[col], block);
        const int64_t height = std::min(kExactPanel, rows.count - row), width = std::min(kExactPanel, cols.count - col);
        for (int64_t i = 0; i < height; ++i)
          std::copy(block + i * kExactPanel, block + i * kExactPanel + width, out + (row + i) * pitch + col);
        for (int64_t j = 0; symmetric && p != c && j < width; ++j)
          for (int64_t i = 0; i < height; ++i) out[(col + j) * pitch + row + i] = block[i * kExactPanel + j];
      }
    }
    tiles.end();
  });
  return true;
}

}  // namespace fastok
