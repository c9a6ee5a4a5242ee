// The launches of max_coverage, by a launcher that starts kernels on a stream or, in the tests, runs them on the host.
#pragma once
#include "max_coverage/max_coverage_kernel.cuh"

namespace fastok::cuda {

// Every pick's two launches, of which the first pick's gains need no cover before them.
template <class Source, class Launch, class Gains>
void run_picks(Launch& launch, const CoverageParams& p, unsigned samples, const Gains& gains) {
  constexpr int kWarps = kCoverageThreads / kWarpSize;
  constexpr size_t bytes = shared_bytes<uint64_t>(kWarps) + shared_bytes<int>(kWarps) + shared_bytes<double>(kWarps);
  for (int step = 0; step < p.k; ++step) {
    gains(step);
    launch(dim3(unsigned(p.plan.row_blocks), samples), dim3(unsigned(p.plan.cover_threads)), bytes,
           cover_kernel<Source>, p, step);
  }
}

template <class T, class Launch>
void run_on_matrix(Launch& launch, const CoverageParams& p, unsigned samples) {
  constexpr size_t bytes = shared_bytes<int>(kGainColumns) + shared_bytes<int>(kMostGainThreads / kWarpSize) +
                           shared_bytes<double>(kMostGainThreads);
  const dim3 tiles(unsigned((p.n + kGainColumns - 1) / kGainColumns), samples);
  run_picks<MatrixSource<T>>(launch, p, samples, [&](int step) {
    launch(tiles, dim3(unsigned(p.plan.gain_threads)), bytes, gain_kernel<T>, p, step);
  });
}

template <class T, class Launch>
void run_max_coverage_of(Launch& launch, CoverageParams p) {
  constexpr int64_t kMostGridYZ = 65535, kWarps = kCoverageThreads / kWarpSize;
  const auto limited = [](int64_t blocks, int64_t most) { return unsigned(blocks < most ? blocks : most); };
  const unsigned samples = limited(p.batch, kMostGridYZ);
  launch.zero(p.peak, size_t(p.batch) * sizeof(int));
  if (!p.pair) {
    const int64_t blocks = (int64_t(p.rows) * p.n + kCoverageThreads - 1) / kCoverageThreads;
    if (blocks > 0) launch(dim3(limited(blocks, 1024), samples), dim3(kCoverageThreads), size_t(0), peak_kernel<T>, p);
    return run_on_matrix<T>(launch, p, samples);
  }

  const auto measure = [&](const void* tokens, int64_t batch_stride, int64_t row_stride, int count, float* scale,
                           double* norm) {
    if (count == 0) return;
    const auto blocks = unsigned((int64_t(p.batch) * count + kWarps - 1) / kWarps);
    launch(dim3(blocks), dim3(kCoverageThreads), size_t(0), coverage_measure_kernel<T>, static_cast<const T*>(tokens),
           batch_stride, row_stride, p.batch, count, p.width, scale, norm);
  };
  measure(p.y, p.y_batch_stride, p.y_row_stride, p.rows, p.y_scale, p.y_norm);
  measure(p.x, p.x_batch_stride, p.x_row_stride, p.n, p.x_scale, p.x_norm);
  const auto tiles = [](int64_t count) { return (count + kProductTile - 1) / kProductTile; };
  constexpr size_t slices = shared_bytes<double>(2 * kProductSlice);
  if (p.rows > 0)
    launch(dim3(unsigned(tiles(p.n)), limited(tiles(p.rows), kMostGridYZ), samples), dim3(kProductThreads), slices,
           similarities_kernel<T>, p);
  if (p.plan.kept) {
    p.matrix = p.kept, p.matrix_batch_stride = int64_t(p.rows) * p.n, p.matrix_row_stride = p.n, p.matrix_stride = 1;
    return run_on_matrix<float>(launch, p, samples);
  }
  constexpr size_t bytes = shared_bytes<int>(kProductTile) + shared_bytes<int>(kProductThreads / kWarpSize) +
                           shared_bytes<double>(kProductThreads * 4) + slices;
  run_picks<PairSource<T>>(launch, p, samples, [&](int step) {
    launch(dim3(unsigned(tiles(p.n)), samples), dim3(kProductThreads), bytes, pair_gain_kernel<T>, p, step);
  });
}

// `p` holds the problem, the results and the working memory.
template <class Launch>
void run_max_coverage(Launch&& launch, Dtype dtype, const CoverageParams& p) {
  switch (dtype) {
    case Dtype::f16:
      return run_max_coverage_of<f16>(launch, p);
    case Dtype::bf16:
      return run_max_coverage_of<bf16>(launch, p);
    default:
      return run_max_coverage_of<float>(launch, p);
  }
}

}  // namespace fastok::cuda
