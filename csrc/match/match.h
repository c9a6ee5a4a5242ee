// Matching on the CPU: what the binding (match_cpu.cpp) and the SIMD cores (match_simd.cpp) share. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cpu/dispatch.h"

namespace fastok {

// Rows of a [N, D] matrix, picked by position.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t stride;            // elements from one row to the next; the last dimension is contiguous
  const int32_t* positions;  // nullptr: row i is row i
  int64_t count;
  int64_t width;           // D
  const bool* mask;        // by row number; nullptr: all rows are candidates
  int64_t first_position;  // rows at positions before this one are no candidates
};

enum class Similarity { cosine, dot, euclidean };

// The mate of a row whose best column an engine leaves to another one.
constexpr int32_t kUndecided = -2;

// One way of comparing packed panels of rows: fp32 vectors, or tiles where the machine has them. A panel holds
// `rows` sources or `cols` destinations, normalised or with their inverse norms; rows past the end are zero, columns
// past the end and those that are no candidates are NaN, so that no comparison can choose them.
struct PanelEngine {
  int rows, cols;
  size_t (*row_panel_bytes)(int64_t width);
  size_t (*col_panel_bytes)(int64_t width);
  // `scratch` holds `width` floats for each row or column of a panel.
  void (*pack_rows)(const Rows&, int64_t panel, Similarity, void* out, float* scratch);
  void (*pack_cols)(const Rows&, int64_t panel, Similarity, void* out, float* scratch);
  // For each row of the row panels: the best score and its column, lowest column first among equals; -inf and -1 if no
  // column compares. `score` and `mate` hold n_row_panels * rows entries.
  void (*best)(const void* row_panels, int64_t n_row_panels, const void* col_panels, int64_t n_col_panels,
               int64_t width, Similarity, float* score, int32_t* mate);
  // For each of the first `n_rows` rows of one row panel: the k best columns, best first, the rest -inf and -1.
  void (*best_k)(const void* row_panel, int64_t n_rows, const void* col_panels, int64_t n_col_panels, int64_t width,
                 Similarity, int64_t k, float* score, int64_t* index);
  // The dot products of a block of panels: out[row * pitch + column].
  void (*dots)(const void* row_panels, int64_t n_row_panels, const void* col_panels, int64_t n_col_panels,
               int64_t width, float* out, int64_t pitch);
};

struct MatchKernels {
  PanelEngine fp32;
  // best() with cosine only; nullptr without such instructions. By products of bf16, for bf16 input; on tiles, for
  // other input, with the results of fp32 vectors to the bit, or kUndecided.
  const PanelEngine *bf16, *split;
};

FASTOK_DECLARE_KERNELS(MatchKernels, match_kernels)

}  // namespace fastok
