// Which selection kernels run, with what. `launch` starts kernels: launch(grid, block, shared bytes, kernel,
// arguments...) and launch.zero(pointer, bytes); the CUDA binding and the host harness each bring their own.
#pragma once
#include "select/peaks_kernel.cuh"
#include "select/select_kernel.cuh"

namespace fastok::cuda {

template <class T, class Launch>
void run_top_of(Launch& launch, int64_t batch, const int64_t* budgets, TopParams p) {
  const dim3 block(unsigned(row_threads(p.n)));
  for (int first = 0; first < p.n_segments && p.segments; first += kBudgets) {
    Budgets part{first, p.n_segments - first < kBudgets ? p.n_segments - first : kBudgets, {}};
    for (int i = 0; i < part.count; ++i) part.k[i] = int(budgets[first + i]);
    launch(dim3(unsigned(batch * part.count)), block, cut_bytes(), cut_kernel<T>, p, part);
  }
  p.sort_width = p.by_score && p.total > 0 && p.total <= kSortedPicks ? int(power_of_two(p.total)) : 0;
  launch(dim3(unsigned(batch)), block, top_bytes(p.total, p.sort_width > 0), top_kernel<T>, p);
  if (!p.picks) return;
  const int blocks = (p.total + kPlaceThreads - 1) / kPlaceThreads;
  launch(dim3(unsigned(batch * blocks)), dim3(kPlaceThreads), shared_bytes<uint64_t>(kPlaceTile), place_kernel<T>, p,
         blocks);
}

// Fills in the plan and runs; p holds the problem, the results, and cuts and picks where they are needed.
template <class Launch>
void run_top(Launch&& launch, Dtype dtype, int64_t batch, const int64_t* budgets, const TopParams& p) {
  switch (dtype) {
    case Dtype::f16:
      return run_top_of<f16>(launch, batch, budgets, p);
    case Dtype::bf16:
      return run_top_of<bf16>(launch, batch, budgets, p);
    default:
      return run_top_of<float>(launch, batch, budgets, p);
  }
}

// Whether top_tokens needs memory for picks that are yet to be put in order.
inline constexpr bool needs_picks(int64_t total, bool by_score) { return by_score && total > kSortedPicks; }

template <class Launch>
void run_sample(Launch&& launch, Dtype dtype, int64_t batch, SampleParams p) {
  const int64_t n_free = p.n - p.protect;
  p.sort_width = int(power_of_two(n_free));
  const auto kernel = dtype == Dtype::f16    ? sample_kernel<f16>
                      : dtype == Dtype::bf16 ? sample_kernel<bf16>
                                             : sample_kernel<float>;
  launch(dim3(unsigned(batch)), dim3(unsigned(row_threads(p.n))), sample_bytes(n_free), kernel, p);
}

template <class T, class Launch>
void run_peaks_of(Launch& launch, int64_t batch, const PeaksParams& p) {
  constexpr int kThreads = 256;
  const int64_t tokens = batch * p.n;
  const dim3 tiles(unsigned(batch * p.row_tiles)), covering(unsigned((tokens + kThreads - 1) / kThreads));
  launch.zero(p.peak_count, size_t(batch) * sizeof(int32_t));
  launch(tiles, dim3(kListThreads), peaks_bytes(), neighbors_kernel<T>, p);
  launch(covering, dim3(kThreads), size_t(0), spread_kernel, p, tokens);
  launch(covering, dim3(kThreads), size_t(0), separate_kernel, p, tokens);
  launch(tiles, dim3(kListThreads), peaks_bytes(), peaks_kernel<T>, p);
}

// p holds the problem and the working memory; the k best scores go to `index`.
template <class Launch>
void run_peaks(Launch&& launch, Dtype dtype, int64_t batch, int64_t k, int64_t* picks, int64_t* index, PeaksParams p) {
  p.row_tiles = (p.n + kListRows - 1) / kListRows;
  switch (dtype) {
    case Dtype::f16:
      run_peaks_of<f16>(launch, batch, p);
      break;
    case Dtype::bf16:
      run_peaks_of<bf16>(launch, batch, p);
      break;
    default:
      run_peaks_of<float>(launch, batch, p);
  }
  TopParams top{};
  top.scores = p.score, top.batch_stride = p.n, top.stride = 1;
  top.n = p.n, top.total = int(k), top.n_segments = 1, top.by_score = true;
  top.picks = picks, top.out = index;
  run_top(launch, Dtype::f32, batch, &k, top);
}

}  // namespace fastok::cuda
