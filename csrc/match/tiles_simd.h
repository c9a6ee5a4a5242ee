// Matching by products of bf16 numbers: of bf16 rows, and on AMX tiles of fp32 rows split in two. See cpu/dispatch.h
// for the rule about linkage.
#pragma once
#include "cpu/tile_simd.h"
#include "cpu/transpose_simd.h"
#include "match/rows_simd.h"

#if defined(__AVX512BF16__)

namespace fastok::FASTOK_ISA {
namespace {

// ---- bf16 rows ---------------------------------------------------------------------------------------------------

// The panel, then the inverse norms. Products of bf16 are exact in fp32 and the norms are applied to the finished dot
// products, so nothing is lost against fp32.
template <bool kColumns>
struct Bf16Panel {
  static constexpr int kCount = kColumns ? Bf16Panels::kCols : Bf16Panels::kRows;

  static size_t bytes(int64_t width) { return Bf16Panels::bytes(width, kCount) + kCount * sizeof(float); }
  static const float* norms(const char* panel, int64_t width) {
    return reinterpret_cast<const float*>(panel + Bf16Panels::bytes(width, kCount));
  }
  static void pack(const Rows& rows, int64_t panel, Similarity, void* out, float* scratch) {
    const int64_t n_blocks = blocks(rows.width);
    float* const norm = const_cast<float*>(norms(static_cast<char*>(out), rows.width));
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = panel * kCount + i;
      const bool valid = row < rows.count && is_candidate(rows, row);
      norm[i] = kColumns ? kNaN : 0.0f;
      if (valid) {
        widen_row(rows, row, scratch);
        norm[i] = 1.0f / clamped_norm(scratch, rows.width);
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
        Bf16Panels::place<kColumns>(depth, i, block, n_blocks, static_cast<bf16*>(out));
      }
    }
  }
};
using Bf16Rows = Bf16Panel<false>;
using Bf16Columns = Bf16Panel<true>;

void best_of_bf16(const void* row_panels, int64_t n_row_panels, const void* col_panels, int64_t n_col_panels,
                  int64_t width, Similarity, float* score, int32_t* mate) {
  using RunningRows = Running<Bf16Rows::kCount>;
  constexpr int64_t kTogether = (16 << 10) / sizeof(RunningRows);  // which stay in the first-level cache
  Bf16Panels::begin();
  const int64_t n_blocks = blocks(width);
  const int64_t row_bytes = int64_t(Bf16Rows::bytes(width)), col_bytes = int64_t(Bf16Columns::bytes(width));
  const int64_t chunk = kChunkBytes / (col_bytes + 1) + 1;
  const vi lanes = lane_numbers();
  const char* a = static_cast<const char*>(row_panels);
  const char* b = static_cast<const char*>(col_panels);
  RunningRows running[kTogether];
  alignas(64) float dots[Bf16Rows::kCount][Bf16Columns::kCount];
  static_assert(Bf16Columns::kCount == 2 * kLanes);
  for (int64_t first = 0; first < n_row_panels; first += kTogether) {
    const int64_t group = n_row_panels - first < kTogether ? n_row_panels - first : kTogether;
    for (int64_t g = 0; g < group; ++g) running[g].reset();
    for (int64_t c0 = 0; c0 < n_col_panels; c0 += chunk) {
      const int64_t c1 = c0 + chunk < n_col_panels ? c0 + chunk : n_col_panels;
      for (int64_t g = 0; g < group; ++g) {
        const char* const rows = a + (first + g) * row_bytes;
        for (int64_t c = c0; c < c1; ++c) {
          const char* const columns = b + c * col_bytes;
          Bf16Panels::multiply(rows, columns, n_blocks, dots[0], Bf16Columns::kCount);
          const float* const norms = Bf16Columns::norms(columns, width);
          const vf norm0 = load(norms), norm1 = load(norms + kLanes);
          const vi column = add(lanes, splat(int32_t(c * Bf16Columns::kCount)));
          for (int i = 0; i < Bf16Rows::kCount; ++i)
            running[g].update(i, load(dots[i]) * norm0, load(dots[i] + kLanes) * norm1, column);
        }
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      const float* const norms = Bf16Rows::norms(a + (first + g) * row_bytes, width);
      for (int i = 0; i < Bf16Rows::kCount; ++i) {
        const int64_t row = (first + g) * Bf16Rows::kCount + i;
        running[g].finish(i, score[row], mate[row]);
        if (mate[row] < 0) continue;
        score[row] *= norms[i];
        if (score[row] != score[row]) score[row] = -kInfinity, mate[row] = -1;  // the source itself is not a number
      }
    }
  }
  Bf16Panels::end();
}

constexpr PanelEngine kBf16Engine = {Bf16Rows::kCount, Bf16Columns::kCount, Bf16Rows::bytes, Bf16Columns::bytes,
                                     Bf16Rows::pack,   Bf16Columns::pack,   best_of_bf16,    nullptr,
                                     nullptr};

#if defined(FASTOK_AMX)

// ---- fp32 rows ---------------------------------------------------------------------------------------------------

// Normalised fp32 rows, and each as a sum of two bf16 numbers, whose products tell which columns can be a row's best;
// of these few, the fp32 sums decide, made in the same order as elsewhere. Columns that are no candidates are NaN.
struct SplitPanel {
  float* rows;       // [32][pitch], zeros behind the width
  bf16 *high, *low;  // two tiles each
  int64_t pitch;

  SplitPanel(const void* panel, int64_t width) : pitch((width + kLanes - 1) / kLanes * kLanes) {
    rows = static_cast<float*>(const_cast<void*>(panel));
    high = reinterpret_cast<bf16*>(rows + kTilePanel * pitch);
    low = high + blocks(width) * 2 * kBlock;
  }
  static size_t bytes(int64_t width) {
    const int64_t pitch = (width + kLanes - 1) / kLanes * kLanes;
    return size_t(kTilePanel * pitch) * sizeof(float) + size_t(blocks(width) * 4 * kBlock) * sizeof(bf16);
  }
};

template <bool kColumns>
void pack_split(const Rows& rows, int64_t panel, Similarity, void* out, float*) {
  const SplitPanel to(out, rows.width);
  const int64_t n_blocks = blocks(rows.width);
  for (int i = 0; i < kTilePanel; ++i) {
    const int64_t row = panel * kTilePanel + i;
    float* const x = to.rows + i * to.pitch;
    const bool valid = row < rows.count && is_candidate(rows, row);
    if (valid) {
      widen_row(rows, row, x);
      divide_row(x, rows.width, clamped_norm(x, rows.width));
    }
    for (int64_t d = valid ? rows.width : 0; d < to.pitch; ++d) x[d] = valid || !kColumns ? 0.0f : kNaN;
  }
  for (int tile = 0; tile < 2; ++tile) {
    for (int64_t block = 0; block < n_blocks; ++block) {
      alignas(64) bf16 high[kTile][kDepth], low[kTile][kDepth];
      for (int i = 0; i < kTile; ++i) {
        const float* const at = to.rows + (tile * kTile + i) * to.pitch + block * kDepth;
        const vf x = load(at), y = block * kDepth + kLanes < to.pitch ? load(at + kLanes) : splat(0.0f);
        store_flushed(high[i], x, y);
        store_flushed(low[i], x - load(high[i]), y - load(high[i] + kLanes));
      }
      place_tile<kColumns>(high, to.high + (tile * n_blocks + block) * kBlock);
      place_tile<kColumns>(low, to.low + (tile * n_blocks + block) * kBlock);
    }
  }
}

// The best and the second best product so far of each row, one candidate per vector lane. The lowest bits of a product
// give way to the number of the vector of columns that it is from. NaN is neither: of two numbers, max and min take the
// second one unless both compare.
struct RunningTwo {
  float best[kTilePanel][kLanes], second[kTilePanel][kLanes];

  void reset() {
    for (int i = 0; i < kTilePanel; ++i) {
      store(best[i], splat(-kInfinity));
      store(second[i], splat(-kInfinity));
    }
  }
  // Of row i, `mask` covering the lowest bits.
  inline __attribute__((always_inline)) void update(int i, vf s0, vf s1, vi mask, vi number0, vi number1) {
    vf first = load(best[i]), next = load(second[i]);
    const auto offer = [&](vf product, vi number) {
      constexpr int kSecondWhereThirdElseFirst = 0xca;
      const vf s = _mm512_castsi512_ps(
          _mm512_ternarylogic_epi32(mask, number, _mm512_castps_si512(product), kSecondWhereThirdElseFirst));
      next = _mm512_max_ps(_mm512_min_ps(first, s), next);
      first = _mm512_max_ps(s, first);
    };
    offer(s0, number0);
    offer(s1, number1);
    store(best[i], first);
    store(second[i], next);
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

// Decides by fp32 sums which columns are best for the rows of a panel.
class Decision {
 public:
  Decision(const SplitPanel& rows, const char* col_panels, int64_t n_col_panels, int64_t width, float* score,
           int32_t* mate)
      : rows_(rows), columns_(col_panels), n_vectors_(2 * n_col_panels), width_(width), score_(score), mate_(mate) {}

  // Returns how many rows are left undecided.
  int decide(const RunningTwo& found, int number_bits) {
    // By how much the products can differ from fp32 sums: what splitting loses, the roundings of both sums (four for
    // each channel), and the bits given away. The best is at most twice that below the one that looks best.
    const float error = 0x1p-16f + float(width_) * 0x1p-22f + float(1 << number_bits) * 0x1p-23f;
    const uint32_t mask = (1u << number_bits) - 1;
    int undecided = 0, lanes_left = kMostLanes;
    for (int i = 0; i < kTilePanel; ++i) {
      score_[i] = -kInfinity;
      mate_[i] = -1;
      const vf best = load(found.best[i]);
      const float top = horizontal_max(best);
      if (!(top > -kInfinity)) continue;
      const vf bar = splat(top - 2 * error);
      const vmask crowded = _mm512_cmp_ps_mask(load(found.second[i]), bar, _CMP_GE_OQ);
      if (__builtin_popcount(crowded) > lanes_left) {
        mate_[i] = kUndecided;
        ++undecided;
        continue;
      }
      lanes_left -= __builtin_popcount(crowded);
      const vmask close = _mm512_cmp_ps_mask(best, bar, _CMP_GE_OQ);
      for (int lane = 0; lane < kLanes; ++lane) {
        if (!(close >> lane & 1)) continue;
        if (crowded >> lane & 1) {
          for (int64_t v = 0; v < n_vectors_; ++v) compare(i, int32_t(v * kLanes + lane));
        } else {
          compare(i, int32_t(bits_of(found.best[i][lane]) & mask) * kLanes + lane);
        }
      }
    }
    while (n_ > 0) compare(row_[0], column_[0]);
    return undecided;
  }

 private:
  // Of a panel's rows, that are compared column by column: each costs as much as another engine takes for a row.
  static constexpr int kMostLanes = 2;

  void compare(int row, int32_t column) {
    row_[n_] = row;
    column_[n_] = column;
    if (++n_ < kLanes) return;
    n_ = 0;
    const float *a[kLanes], *b[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      const SplitPanel panel(columns_ + column_[j] / kTilePanel * int64_t(SplitPanel::bytes(width_)), width_);
      a[j] = rows_.rows + row_[j] * rows_.pitch;
      b[j] = panel.rows + column_[j] % kTilePanel * rows_.pitch;
    }
    float product[kLanes];
    store(product, pair_products(a, b, rows_.pitch));
    for (int j = 0; j < kLanes; ++j) {
      float& score = score_[row_[j]];
      int32_t& mate = mate_[row_[j]];
      if (product[j] > score || (product[j] == score && column_[j] < mate)) score = product[j], mate = column_[j];
    }
  }

  const SplitPanel& rows_;
  const char* columns_;
  int64_t n_vectors_, width_;
  float* score_;
  int32_t* mate_;
  int row_[kLanes], n_ = 0;  // pairs still to be compared
  int32_t column_[kLanes];
};

void best_split(const void* row_panels, int64_t n_row_panels, const void* col_panels, int64_t n_col_panels,
                int64_t width, Similarity, float* score, int32_t* mate) {
  configure_tiles();
  const int64_t n_blocks = blocks(width), panel_bytes = int64_t(SplitPanel::bytes(width));
  const int64_t tile_bytes = n_blocks * 4 * kBlock * int64_t(sizeof(bf16)), chunk = kChunkBytes / (tile_bytes + 1) + 1;
  int number_bits = 0;
  while (int64_t(1) << number_bits < 2 * n_col_panels) ++number_bits;
  const vi mask = splat(int32_t((1u << number_bits) - 1));
  const char* const a = static_cast<const char*>(row_panels);
  const char* const b = static_cast<const char*>(col_panels);
  RunningTwo running[kGroup];
  alignas(64) float dots[kTilePanel][kTilePanel];
  // One panel first, as the last of each group tells whether the next rows can be told apart at all.
  for (int64_t first = 0, group = 1, undecided = 0; first < n_row_panels; first += group) {
    if (undecided > kTilePanel / 2) {
      for (int64_t i = first * kTilePanel; i < n_row_panels * kTilePanel; ++i) mate[i] = kUndecided;
      break;
    }
    if (first > 0) group = n_row_panels - first < kGroup ? n_row_panels - first : kGroup;
    for (int64_t g = 0; g < group; ++g) running[g].reset();
    for (int64_t c0 = 0; c0 < n_col_panels; c0 += chunk) {
      const int64_t c1 = c0 + chunk < n_col_panels ? c0 + chunk : n_col_panels;
      for (int64_t g = 0; g < group; ++g) {
        const SplitPanel rows(a + (first + g) * panel_bytes, width);
        for (int64_t c = c0; c < c1; ++c) {
          const SplitPanel columns(b + c * panel_bytes, width);
          multiply_split(rows.high, rows.low, columns.high, columns.low, n_blocks, dots[0], kTilePanel);
          const vi number0 = splat(int32_t(2 * c)), number1 = splat(int32_t(2 * c + 1));
          for (int i = 0; i < kTilePanel; ++i)
            running[g].update(i, load(dots[i]), load(dots[i] + kLanes), mask, number0, number1);
        }
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      const int64_t at = (first + g) * kTilePanel;
      const SplitPanel rows(a + (first + g) * panel_bytes, width);
      undecided = Decision(rows, b, n_col_panels, width, score + at, mate + at).decide(running[g], number_bits);
    }
  }
  _tile_release();
}

constexpr PanelEngine kSplitEngine = {kTilePanel,        kTilePanel,        SplitPanel::bytes,
                                      SplitPanel::bytes, pack_split<false>, pack_split<true>,
                                      best_split,        nullptr,           nullptr};

#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA

#endif
