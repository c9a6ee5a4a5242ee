// Similarity fused with the running best, over panels that fit the caches: the score matrix is never written.
#include "cpu/tile_simd.h"
#include "cpu/transpose_simd.h"
#include "match/match.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Columns are taken in chunks that stay in the second-level cache while all row panels pass over them.
constexpr int64_t kChunkBytes = 384 << 10;

template <class T>
void widen_row(const T* x, int64_t width, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(x + d));
  for (; d < width; ++d) out[d] = widen(x[d]);
}

void widen_row(const Rows& rows, int64_t row, float* out) {
  const int64_t position = rows.positions ? rows.positions[row] : row;
  const int64_t offset = position * rows.stride;
  switch (rows.dtype) {
    case Dtype::f16:
      return widen_row(static_cast<const f16*>(rows.data) + offset, rows.width, out);
    case Dtype::bf16:
      return widen_row(static_cast<const bf16*>(rows.data) + offset, rows.width, out);
    default:
      return widen_row(static_cast<const float*>(rows.data) + offset, rows.width, out);
  }
}

bool is_candidate(const Rows& rows, int64_t row) {
  const int64_t position = rows.positions ? rows.positions[row] : row;
  return position >= rows.first_position && (!rows.mask || rows.mask[row]);
}

// A power of two near 1/max|x|, so that neither squares nor sums of squares overflow or vanish.
float range_scale(const float* x, int64_t width) {
  vf peak = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) peak = maximum(absolute(load(x + d)), peak);
  float top = horizontal_max(peak);
  for (; d < width; ++d) top = __builtin_fabsf(x[d]) > top ? __builtin_fabsf(x[d]) : top;
  if (!(top > 0x1p-126f && top < kInfinity)) return top > 0 && top < kInfinity ? 0x1p126f : 1.0f;
  const uint32_t exponent = bits_of(top) >> 23;
  return float_of((exponent >= 253 ? 1u : 254 - exponent) << 23);
}

float sum_of_squares(const float* x, int64_t width) {
  vf sum = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) sum = fma(load(x + d), load(x + d), sum);
  float total = horizontal_sum(sum);
  for (; d < width; ++d) total += x[d] * x[d];
  return total;
}

void scale_row(float* x, int64_t width, float factor) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(x + d, load(x + d) * splat(factor));
  for (; d < width; ++d) x[d] *= factor;
}

void divide_row(float* x, int64_t width, float divisor) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(x + d, load(x + d) / splat(divisor));
  for (; d < width; ++d) x[d] /= divisor;
}

// What to divide a row by: max(its norm, 1e-12). A row whose squares leave fp32's range is first multiplied by a power
// of two, in place, and so is the norm.
float clamped_norm(float* x, int64_t width) {
  constexpr float kSmallestSafeSquare = 0x1p-80f, kLargestSafeSquare = 0x1p80f;
  float total = sum_of_squares(x, width), scale = 1.0f;
  if (!(total >= kSmallestSafeSquare && total <= kLargestSafeSquare)) {
    scale = range_scale(x, width);
    if (scale != 1.0f) {
      scale_row(x, width, scale);
      total = sum_of_squares(x, width);
    }
  }
  const float norm = __builtin_sqrtf(total);
  return norm < 1e-12f * scale ? 1e-12f * scale : norm;
}

// ---- fp32 engine ----------------------------------------------------------------------------------------------------
// A panel is [width][kRows] or [width][kCols] floats.

size_t row_panel_bytes(int64_t width) { return size_t(width) * kRows * sizeof(float); }
size_t col_panel_bytes(int64_t width) { return size_t(width) * kCols * sizeof(float); }

// Rows [kPanel][width] to a panel [width][kPanel], a few channels at a time, so that the lines written stay in the
// first-level cache until they are full.
template <int kPanel>
void interleave(const float* x, int64_t width, float* out) {
  constexpr int64_t kChannels = 16;
  int64_t begin = 0;
#if defined(__AVX512F__)
  for (; begin + kChannels <= width; begin += kChannels) {
    for (int first = 0; first < kPanel; first += kLanes) {
      const int count = kPanel - first < kLanes ? kPanel - first : kLanes;
      vf r[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) r[i] = i < count ? load(x + (first + i) * width + begin) : splat(0.0f);
      transpose(r);
#pragma GCC unroll 16
      for (int d = 0; d < kLanes; ++d)
        _mm512_mask_storeu_ps(out + (begin + d) * kPanel + first, vmask((1u << count) - 1), r[d]);
    }
  }
#endif
  for (; begin < width; begin += kChannels) {
    const int64_t end = begin + kChannels < width ? begin + kChannels : width;
    for (int i = 0; i < kPanel; ++i)
      for (int64_t d = begin; d < end; ++d) out[d * kPanel + i] = x[i * width + d];
  }
}

template <int kPanel>
void pack(const Rows& rows, int64_t panel, Similarity similarity, float filler, float* out, float* scratch) {
  for (int i = 0; i < kPanel; ++i) {
    const int64_t row = panel * kPanel + i;
    float* const x = scratch + i * rows.width;
    if (row >= rows.count || !is_candidate(rows, row)) {
      for (int64_t d = 0; d < rows.width; ++d) x[d] = filler;
      continue;
    }
    widen_row(rows, row, x);
    if (similarity == Similarity::cosine) divide_row(x, rows.width, clamped_norm(x, rows.width));
  }
  interleave<kPanel>(scratch, rows.width, out);
}

void pack_rows(const Rows& rows, int64_t panel, Similarity similarity, void* out, float* scratch) {
  pack<kRows>(rows, panel, similarity, 0.0f, static_cast<float*>(out), scratch);
}
void pack_cols(const Rows& rows, int64_t panel, Similarity similarity, void* out, float* scratch) {
  pack<kCols>(rows, panel, similarity, kNaN, static_cast<float*>(out), scratch);
}

// The best column so far of each row, one candidate per vector lane.
template <int kTileRows>
struct Running {
  float score[kTileRows][kLanes];
  int32_t column[kTileRows][kLanes];

  void reset() {
    for (int i = 0; i < kTileRows; ++i) {
      store(score[i], splat(-kInfinity));
      store(column[i], splat(int32_t(-1)));
    }
  }
  // Columns arrive in ascending order, so a strict comparison keeps the lowest of equals in every lane.
  inline __attribute__((always_inline)) void update(int i, vf s0, vf s1, vi c0) {
    const vmask second = greater(s1, s0);
    const vmask alone = either(second, unordered(s0));  // a NaN in s0 must not hide s1
    const vf s = select(alone, s1, s0);
    const vi c = select(alone, add(c0, splat(int32_t(kLanes))), c0);
    const vf before = load(score[i]);
    const vmask better = greater(s, before);
    store(score[i], select(better, s, before));
    store(column[i], select(better, c, load(column[i])));
  }
  // A lane that holds more than -inf holds a column too.
  void finish(int i, float& best, int32_t& mate) const {
    best = horizontal_max(load(score[i]));
    int32_t lowest = std::numeric_limits<int32_t>::max();
    for (int lane = 0; lane < kLanes; ++lane) {
      const int32_t c = score[i][lane] == best ? column[i][lane] : lowest;
      lowest = c < lowest ? c : lowest;
    }
    mate = best > -kInfinity ? lowest : -1;
  }
};

// Scores of a kRows x kCols tile; `consume(i, s0, s1)` gets each row's two vectors.
template <Similarity kSimilarity, class Consume>
inline __attribute__((always_inline)) void tile(const float* a, const float* b, int64_t width, const Consume& consume) {
  constexpr bool kSquares = kSimilarity == Similarity::euclidean;
  multiply_panels<kSquares>(a, b, width, [&](int i, vf s0, vf s1) {
    if constexpr (kSquares) {
      consume(i, splat(0.0f) - s0, splat(0.0f) - s1);
    } else {
      consume(i, s0, s1);
    }
  });
}

// Row panels are taken in groups whose running best stays in the first-level cache.
constexpr int64_t kGroup = 8;

const vi lane_numbers() {
  int32_t lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return load(lane);
}

template <Similarity kSimilarity>
void best_of(const float* a, int64_t n_row_panels, const float* b, int64_t n_col_panels, int64_t width, float* score,
             int32_t* mate) {
  const int64_t chunk = kChunkBytes / int64_t(col_panel_bytes(width) + 1) + 1;
  const vi lanes = lane_numbers();
  Running<kRows> running[kGroup];
  for (int64_t first = 0; first < n_row_panels; first += kGroup) {
    const int64_t group = n_row_panels - first < kGroup ? n_row_panels - first : kGroup;
    for (int64_t g = 0; g < group; ++g) running[g].reset();
    for (int64_t c0 = 0; c0 < n_col_panels; c0 += chunk) {
      const int64_t c1 = c0 + chunk < n_col_panels ? c0 + chunk : n_col_panels;
      for (int64_t g = 0; g < group; ++g) {
        const float* rows = a + (first + g) * width * kRows;
        for (int64_t c = c0; c < c1; ++c) {
          const vi column = add(lanes, splat(int32_t(c * kCols)));
          tile<kSimilarity>(rows, b + c * width * kCols, width,
                            [&](int i, vf s0, vf s1) { running[g].update(i, s0, s1, column); });
        }
      }
    }
    for (int64_t g = 0; g < group; ++g)
      for (int i = 0; i < kRows; ++i)
        running[g].finish(i, score[(first + g) * kRows + i], mate[(first + g) * kRows + i]);
  }
}

void best(const void* row_panels, int64_t n_row_panels, const void* col_panels, int64_t n_col_panels, int64_t width,
          Similarity similarity, float* score, int32_t* mate) {
  const auto run = similarity == Similarity::euclidean ? best_of<Similarity::euclidean> : best_of<Similarity::dot>;
  run(static_cast<const float*>(row_panels), n_row_panels, static_cast<const float*>(col_panels), n_col_panels, width,
      score, mate);
}

// A binary heap of the k best so far, the worst on top.
struct Heap {
  float* score;
  int64_t* index;
  int64_t size, k;

  bool worse(int64_t i, int64_t j) const {
    return score[i] < score[j] || (score[i] == score[j] && index[i] > index[j]);
  }
  void swap(int64_t i, int64_t j) {
    const float s = score[i];
    const int64_t n = index[i];
    score[i] = score[j], index[i] = index[j];
    score[j] = s, index[j] = n;
  }
  void sink(int64_t i, int64_t end) {
    for (int64_t child; (child = 2 * i + 1) < end; i = child) {
      if (child + 1 < end && worse(child + 1, child)) ++child;
      if (!worse(child, i)) return;
      swap(i, child);
    }
  }
  // Candidates come in ascending index, so an equal score never replaces.
  void offer(float s, int64_t n) {
    if (size < k) {
      score[size] = s, index[size] = n;
      for (int64_t i = size++; i > 0 && worse(i, (i - 1) / 2); i = (i - 1) / 2) swap(i, (i - 1) / 2);
    } else if (s > score[0]) {
      score[0] = s, index[0] = n;
      sink(0, k);
    }
  }
  void sort_best_first() {
    for (int64_t end = size - 1; end > 0; --end) {
      swap(0, end);
      sink(0, end);
    }
    for (int64_t i = size; i < k; ++i) score[i] = -kInfinity, index[i] = -1;
  }
};

template <Similarity kSimilarity>
void best_k_of(const float* a, int64_t n_rows, const float* b, int64_t n_col_panels, int64_t width, int64_t k,
               float* score, int64_t* index) {
  Heap heaps[kRows];
  for (int i = 0; i < kRows; ++i) heaps[i] = {score + i * k, index + i * k, 0, k};
  float scores[kRows][kCols];
  for (int64_t c = 0; c < n_col_panels; ++c) {
    tile<kSimilarity>(a, b + c * width * kCols, width, [&](int i, vf s0, vf s1) {
      store(scores[i], s0);
      store(scores[i] + kLanes, s1);
    });
    for (int64_t i = 0; i < n_rows; ++i) {
      Heap& heap = heaps[i];
      if (heap.size == k) {
        const vf bar = splat(heap.score[0]);
        if (!any(either(greater(load(scores[i]), bar), greater(load(scores[i] + kLanes), bar)))) continue;
      }
      for (int j = 0; j < kCols; ++j)
        if (scores[i][j] > -kInfinity) heap.offer(scores[i][j], c * kCols + j);  // false for NaN
    }
  }
  for (int64_t i = 0; i < n_rows; ++i) heaps[i].sort_best_first();
}

void best_k(const void* row_panel, int64_t n_rows, const void* col_panels, int64_t n_col_panels, int64_t width,
            Similarity similarity, int64_t k, float* score, int64_t* index) {
  const auto run = similarity == Similarity::euclidean ? best_k_of<Similarity::euclidean> : best_k_of<Similarity::dot>;
  run(static_cast<const float*>(row_panel), n_rows, static_cast<const float*>(col_panels), n_col_panels, width, k,
      score, index);
}

// Depth is taken in slices that fit the first-level cache together with the column panel they meet.
constexpr int64_t kSlice = 256;

void dots(const void* row_panels, int64_t n_row_panels, const void* col_panels, int64_t n_col_panels, int64_t width,
          float* out, int64_t pitch) {
  const float* a = static_cast<const float*>(row_panels);
  const float* b = static_cast<const float*>(col_panels);
  int64_t d = 0;
  do {
    const int64_t depth = width - d < kSlice ? width - d : kSlice;
    for (int64_t c = 0; c < n_col_panels; ++c) {
      for (int64_t r = 0; r < n_row_panels; ++r) {
        float* const block = out + r * kRows * pitch + c * kCols;
        vf acc[kRows][2];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          acc[i][0] = d == 0 ? splat(0.0f) : load(block + i * pitch);
          acc[i][1] = d == 0 ? splat(0.0f) : load(block + i * pitch + kLanes);
        }
        accumulate<false>(a + (r * width + d) * kRows, b + (c * width + d) * kCols, depth, acc);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          store(block + i * pitch, acc[i][0]);
          store(block + i * pitch + kLanes, acc[i][1]);
        }
      }
    }
    d += depth;
  } while (d < width);
}

// ---- bf16 engine: AMX tiles -----------------------------------------------------------------------------------------
#if defined(FASTOK_AMX)

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
#endif

}  // namespace

extern const MatchKernels match_kernels;
const MatchKernels match_kernels = {
    {kRows, kCols, row_panel_bytes, col_panel_bytes, pack_rows, pack_cols, best, best_k, dots},
#if defined(FASTOK_AMX)
    &kTileEngine,
#else
    nullptr,
#endif
};

}  // namespace fastok::FASTOK_ISA
