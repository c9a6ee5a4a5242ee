// Similarity fused with the running best, over panels that fit the caches: the score matrix is never written.
#include "cpu/tile_simd.h"
#include "cpu/transpose_simd.h"
#include "match/match.h"
#include "match/rows_simd.h"
#include "match/tiles_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

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

// Scores of a kRows x kCols tile; `consume(i, s0, s1)` gets each row's two vectors.
template <Similarity kSimilarity, class Consume>
inline __attribute__((always_inline)) void tile(const float* a, const float* b, int64_t width, const Consume& consume) {
  if constexpr (kSimilarity == Similarity::euclidean) {
    multiply_panels<SquaredDifference>(a, b, width,
                                       [&](int i, vf s0, vf s1) { consume(i, splat(0.0f) - s0, splat(0.0f) - s1); });
  } else {
    multiply_panels<Fma>(a, b, width, consume);
  }
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
        accumulate<Fma>(a + (r * width + d) * kRows, b + (c * width + d) * kCols, depth, acc);
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

}  // namespace

extern const MatchKernels match_kernels;
const MatchKernels match_kernels = {
    {kRows, kCols, row_panel_bytes, col_panel_bytes, pack_rows, pack_cols, best, best_k, dots},
#if defined(__AVX512BF16__)
    &kBf16Engine,
#else
    nullptr,
#endif
#if defined(FASTOK_AMX)
    &kSplitEngine,
#else
    nullptr,
#endif
};

}  // namespace fastok::FASTOK_ISA
