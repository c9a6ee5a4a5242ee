// Matching on AMX tiles: bf16 rows, and fp32 rows split in two. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/tile_simd.h"
#include "cpu/transpose_simd.h"
#include "match/rows_simd.h"

#if defined(FASTOK_AMX)

namespace fastok::FASTOK_ISA {
namespace {

// ---- bf16
// ------------------------------------------------------------------------------------------------------------

// Two tiles, then 32 inverse norms. Products of bf16 are exact in fp32 and the norms are applied to the finished dot
// products, so nothing is lost against fp32.
size_t tile_panel_bytes(int64_t width) {
  return size_t(blocks(width)) * 2 * kBlock * sizeof(bf16) + kTilePanel * sizeof(float);
}
float* norms_of(void* panel, int64_t width) {
  return reinterpret_cast<float*>(static_cast<bf16*>(panel) + blocks(width) * 2 * kBlock);
}

template <bool kColumns>
void pack_tiles(const Rows& rows, int64_t panel, Similarity, void* out, float* scratch) {
  const int64_t n_blocks = blocks(rows.width);
  float* norms = norms_of(out, rows.width);
  for (int i = 0; i < kTilePanel; ++i) {
    const int64_t row = panel * kTilePanel + i;
    bf16* base = static_cast<bf16*>(out) + (i / kTile) * n_blocks * kBlock;
    const bool valid = row < rows.count && is_candidate(rows, row);
    norms[i] = kColumns ? kNaN : 0.0f;
    if (valid) {
      widen_row(rows, row, scratch);
      norms[i] = 1.0f / clamped_norm(scratch, rows.width);
    }
    for (int64_t block = 0; block < n_blocks; ++block) {
      // Back to bf16, which is exact: at most a power of two has been multiplied in.
      alignas(64) bf16 depth[kDepth] = {};
      const int64_t begin = block * kDepth, rest = valid ? rows.width - begin : 0;
      if (rest >= kDepth) {
        for (int d = 0; d < kDepth; d += kLanes) store(depth + d, load(scratch + begin + d));
      } else {
        for (int d = 0; d < rest; ++d) narrow(scratch[begin + d], depth[d]);
      }
      place_depth<kColumns>(depth, i % kTile, base + block * kBlock);
    }
  }
}

void best_tiles(const void* row_panels, int64_t n_row_panels, const void* col_panels, int64_t n_col_panels,
                int64_t width, Similarity, float* score, int32_t* mate) {
  configure_tiles();
  const int64_t n_blocks = blocks(width);
  const int64_t panel_bytes = int64_t(tile_panel_bytes(width));
  const int64_t chunk = kChunkBytes / (panel_bytes + 1) + 1;
  const vi lanes = lane_numbers();
  const char* a = static_cast<const char*>(row_panels);
  const char* b = static_cast<const char*>(col_panels);
  Running<kTilePanel> running[kGroup / 2];
  alignas(64) float dots[kTilePanel][kTilePanel];
  for (int64_t first = 0; first < n_row_panels; first += kGroup / 2) {
    const int64_t group = n_row_panels - first < kGroup / 2 ? n_row_panels - first : kGroup / 2;
    for (int64_t g = 0; g < group; ++g) running[g].reset();
    for (int64_t c0 = 0; c0 < n_col_panels; c0 += chunk) {
      const int64_t c1 = c0 + chunk < n_col_panels ? c0 + chunk : n_col_panels;
      for (int64_t g = 0; g < group; ++g) {
        const bf16* a0 = reinterpret_cast<const bf16*>(a + (first + g) * panel_bytes);
        for (int64_t c = c0; c < c1; ++c) {
          const bf16* b0 = reinterpret_cast<const bf16*>(b + c * panel_bytes);
          const float* norms = reinterpret_cast<const float*>(b0 + 2 * n_blocks * kBlock);
          multiply_panels(a0, b0, n_blocks, dots[0], kTilePanel);
          const vf norm0 = load(norms), norm1 = load(norms + kLanes);
          const vi column = add(lanes, splat(int32_t(c * kTilePanel)));
          for (int i = 0; i < kTilePanel; ++i)
            running[g].update(i, load(dots[i]) * norm0, load(dots[i] + kLanes) * norm1, column);
        }
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      const float* norms = reinterpret_cast<const float*>(a + (first + g + 1) * panel_bytes) - kTilePanel;
      for (int i = 0; i < kTilePanel; ++i) {
        const int64_t row = (first + g) * kTilePanel + i;
        running[g].finish(i, score[row], mate[row]);
        if (mate[row] < 0) continue;
        score[row] *= norms[i];
        if (score[row] != score[row]) score[row] = -kInfinity, mate[row] = -1;  // the source itself is not a number
      }
    }
  }
  _tile_release();
}

constexpr PanelEngine kTileEngine = {kTilePanel,       kTilePanel,        tile_panel_bytes,
                                     tile_panel_bytes, pack_tiles<false>, pack_tiles<true>,
                                     best_tiles,       nullptr,           nullptr};

// ---- fp32
// ------------------------------------------------------------------------------------------------------------

// Normalised fp32 rows, and each as a sum of two bf16 numbers, whose products tell which columns can be a row's best;
// of these few, the fp32 sums decide, made in the same order as elsewhere.
struct SplitPanel {
  float* rows;       // [32][pitch], zeros behind the width
  bf16 *high, *low;  // two tiles each
  float* bias;       // -inf for those that are no candidates, else 0
  int64_t pitch;

  SplitPanel(const void* panel, int64_t width) : pitch((width + kLanes - 1) / kLanes * kLanes) {
    char* at = static_cast<char*>(const_cast<void*>(panel));
    rows = reinterpret_cast<float*>(at);
    high = reinterpret_cast<bf16*>(rows + kTilePanel * pitch);
    low = high + blocks(width) * 2 * kBlock;
    bias = reinterpret_cast<float*>(low + blocks(width) * 2 * kBlock);
  }
  static size_t bytes(int64_t width) {
    const SplitPanel empty(nullptr, width);
    return size_t(reinterpret_cast<char*>(empty.bias + kTilePanel) - reinterpret_cast<char*>(empty.rows));
  }
};

// By how much the products of split rows, summed up by tiles, can differ from fp32 sums: what splitting loses, and the
// roundings of both sums (twice as many, to be safe).
float split_error(int64_t width) { return 0x1p-16f + float(width) * 0x1p-21f; }

template <bool kColumns>
void pack_split(const Rows& rows, int64_t panel, Similarity, void* out, float*) {
  const SplitPanel to(out, rows.width);
  const int64_t n_blocks = blocks(rows.width);
  for (int i = 0; i < kTilePanel; ++i) {
    const int64_t row = panel * kTilePanel + i;
    float* const x = to.rows + i * to.pitch;
    const bool valid = row < rows.count && is_candidate(rows, row);
    to.bias[i] = valid ? 0.0f : -kInfinity;
    if (valid) {
      widen_row(rows, row, x);
      divide_row(x, rows.width, clamped_norm(x, rows.width));
    }
    for (int64_t d = valid ? rows.width : 0; d < to.pitch; ++d) x[d] = 0;
  }
  for (int tile = 0; tile < 2; ++tile) {
    for (int64_t block = 0; block < n_blocks; ++block) {
      alignas(64) bf16 high[kTile][kDepth], low[kTile][kDepth];
      for (int i = 0; i < kTile; ++i) {
        for (int d = 0; d < kDepth; d += kLanes) {
          const int64_t at = block * kDepth + d;
          const vf x = at < to.pitch ? load(to.rows + (tile * kTile + i) * to.pitch + at) : splat(0.0f);
          store(high[i] + d, x);
          store(low[i] + d, x - load(high[i] + d));
        }
      }
      place_tile<kColumns>(high, to.high + (tile * n_blocks + block) * kBlock);
      place_tile<kColumns>(low, to.low + (tile * n_blocks + block) * kBlock);
    }
  }
}

// The best and the second best score so far of each row, one candidate per vector lane.
struct RunningTwo {
  float best[kTilePanel][kLanes], second[kTilePanel][kLanes];
  int32_t column[kTilePanel][kLanes];

  void reset() {
    for (int i = 0; i < kTilePanel; ++i) {
      store(best[i], splat(-kInfinity));
      store(second[i], splat(-kInfinity));
      store(column[i], splat(int32_t(-1)));
    }
  }
  // Not a number is never better, nor second best.
  inline __attribute__((always_inline)) void update(int i, vf s0, vf s1, vi c0) {
    vf first = load(best[i]), next = load(second[i]);
    vi c = load(column[i]);
    const auto offer = [&](vf s, vi of) {
      const vmask better = greater(s, first);
      const vf loser = select(better, first, s);
      next = select(greater(loser, next), loser, next);
      first = select(better, s, first);
      c = select(better, of, c);
    };
    offer(s0, c0);
    offer(s1, add(c0, splat(int32_t(kLanes))));
    store(best[i], first);
    store(second[i], next);
    store(column[i], c);
  }
};

// fp32 products of up to 16 pairs of rows, summed up in ascending order.
inline vf pair_products(const float* const (&a)[kLanes], const float* const (&b)[kLanes], int64_t pitch) {
  vf sum = splat(0.0f);
  for (int64_t d = 0; d < pitch; d += kLanes) {
    vf x[kLanes], y[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) x[i] = load(a[i] + d), y[i] = load(b[i] + d);
    transpose(x);
    transpose(y);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) sum = fma(x[i], y[i], sum);
  }
  return sum;
}

// From what tiles made of the rows of one panel to their best columns.
void decide(const RunningTwo& found, const SplitPanel& rows, const char* col_panels, int64_t col_bytes, int64_t width,
            float* score, int32_t* mate) {
  const vf margin = splat(2 * split_error(width));
  int32_t row_of[kTilePanel * kLanes], column_of[kTilePanel * kLanes];
  int n_pairs = 0;
  for (int i = 0; i < kTilePanel; ++i) {
    score[i] = -kInfinity;
    mate[i] = -1;
    const vf best = load(found.best[i]), bar = splat(horizontal_max(best)) - margin;
    if (!any(greater(best, splat(-kInfinity)))) continue;
    if (any(_mm512_cmp_ps_mask(load(found.second[i]), bar, _CMP_GE_OQ))) {
      mate[i] = kUndecided;
      continue;
    }
    const vmask close = _mm512_cmp_ps_mask(best, bar, _CMP_GE_OQ);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(close >> lane & 1)) continue;
      row_of[n_pairs] = i;
      column_of[n_pairs++] = found.column[i][lane];
    }
  }
  for (int first = 0; first < n_pairs; first += kLanes) {
    const int count = n_pairs - first < kLanes ? n_pairs - first : kLanes;
    const float *a[kLanes], *b[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      const int pair = first + (j < count ? j : 0);
      const SplitPanel columns(col_panels + column_of[pair] / kTilePanel * col_bytes, width);
      a[j] = rows.rows + row_of[pair] * rows.pitch;
      b[j] = columns.rows + column_of[pair] % kTilePanel * rows.pitch;
    }
    float product[kLanes];
    store(product, pair_products(a, b, rows.pitch));
    for (int j = 0; j < count; ++j) {
      const int i = row_of[first + j];
      const int32_t column = column_of[first + j];
      if (product[j] > score[i] || (product[j] == score[i] && column < mate[i]))
        score[i] = product[j], mate[i] = column;
    }
  }
}

void best_split(const void* row_panels, int64_t n_row_panels, const void* col_panels, int64_t n_col_panels,
                int64_t width, Similarity, float* score, int32_t* mate) {
  configure_tiles();
  const int64_t n_blocks = blocks(width), panel_bytes = int64_t(SplitPanel::bytes(width));
  const int64_t tile_bytes = n_blocks * 4 * kBlock * int64_t(sizeof(bf16)), chunk = kChunkBytes / (tile_bytes + 1) + 1;
  const vi lanes = lane_numbers();
  const char* const a = static_cast<const char*>(row_panels);
  const char* const b = static_cast<const char*>(col_panels);
  RunningTwo running[kGroup / 2];
  alignas(64) float dots[kTilePanel][kTilePanel];
  for (int64_t first = 0; first < n_row_panels; first += kGroup / 2) {
    const int64_t group = n_row_panels - first < kGroup / 2 ? n_row_panels - first : kGroup / 2;
    for (int64_t g = 0; g < group; ++g) running[g].reset();
    for (int64_t c0 = 0; c0 < n_col_panels; c0 += chunk) {
      const int64_t c1 = c0 + chunk < n_col_panels ? c0 + chunk : n_col_panels;
      for (int64_t g = 0; g < group; ++g) {
        const SplitPanel rows(a + (first + g) * panel_bytes, width);
        for (int64_t c = c0; c < c1; ++c) {
          const SplitPanel columns(b + c * panel_bytes, width);
          multiply_split(rows.high, rows.low, columns.high, columns.low, n_blocks, dots[0], kTilePanel);
          const vf bias0 = load(columns.bias), bias1 = load(columns.bias + kLanes);
          const vi column = add(lanes, splat(int32_t(c * kTilePanel)));
          for (int i = 0; i < kTilePanel; ++i)
            running[g].update(i, load(dots[i]) + bias0, load(dots[i] + kLanes) + bias1, column);
        }
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      const int64_t at = (first + g) * kTilePanel;
      decide(running[g], SplitPanel(a + (first + g) * panel_bytes, width), b, panel_bytes, width, score + at,
             mate + at);
    }
  }
  _tile_release();
}

constexpr PanelEngine kSplitEngine = {kTilePanel,        kTilePanel,        SplitPanel::bytes,
                                      SplitPanel::bytes, pack_split<false>, pack_split<true>,
                                      best_split,        nullptr,           nullptr};

}  // namespace
}  // namespace fastok::FASTOK_ISA

#endif
