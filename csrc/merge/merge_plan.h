// Shapes of the merging kernels: grids, vector widths, shared memory. Pure functions of the problem, for host and
// device. Torch-free.
#pragma once
#include "common/plan.h"

namespace fastok::cuda {

enum class MergeMode { mean, sum, max, first };

// ---- maps -----------------------------------------------------------------------------------------------------------

// Building a CSR map: `warps` warps take a stretch of tokens each, with a cursor per slot and warp.
struct CsrPlan {
  int warps;
  bool shared;   // cursors in shared memory; else one warp keeps them in `offsets`
  size_t bytes;  // of shared memory
};

inline constexpr CsrPlan plan_csr(int64_t n, int64_t n_out, int most_warps, size_t budget) {
  const size_t per_warp = size_t(n_out) * sizeof(int);
  if (per_warp > budget) return {1, false, 0};
  int warps = 1;
  // A stretch is worth a warp from a few steps of 32 tokens on.
  while (warps * 2 <= most_warps && size_t(warps) * 2 * per_warp <= budget && warps * 2 * 64 <= n) warps *= 2;
  return {warps, true, shared_bytes<int>(size_t(warps) * size_t(n_out))};
}

struct MapPlan {
  int threads;
  size_t bytes;  // of shared memory: one int per warp, then the cursors
  CsrPlan csr;
};

inline constexpr MapPlan plan_map(int64_t n, int64_t n_out) {
  const int threads = n > 2048 || n_out > 2048 ? 1024 : 256;
  const size_t scratch = shared_bytes<int>(32);
  const CsrPlan csr = plan_csr(n, n_out, threads / 32, kMostSharedBytes - scratch);
  return {threads, scratch + csr.bytes, csr};
}

// ---- rows -----------------------------------------------------------------------------------------------------------

constexpr int kRowThreads = 256;

// Each row of the result is written by a group of lanes of one warp, `vector` elements per lane and step.
struct RowPlan {
  int vector;  // elements moved at once: 16 bytes' worth, or 1
  int lanes;   // a power of two, at most 32
  int64_t row_blocks;
};

inline constexpr RowPlan plan_rows(int64_t rows, int64_t channels, size_t element_size, bool aligned) {
  const int vector = aligned ? int(16 / element_size) : 1;
  const int64_t packs = (channels + vector - 1) / vector;
  int lanes = 1;
  while (lanes < 32 && lanes < packs) lanes *= 2;
  const int64_t rows_per_block = kRowThreads / lanes;
  return {vector, lanes, (rows + rows_per_block - 1) / rows_per_block};
}

// Whether an array of rows can be moved 16 bytes at a time.
inline bool rows_aligned(const void* data, int64_t batch_stride, int64_t row_stride, int64_t channels,
                         size_t element_size) {
  const auto even = [&](int64_t elements) { return elements * int64_t(element_size) % 16 == 0; };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && even(batch_stride) && even(row_stride) && even(channels);
}

}  // namespace fastok::cuda
