// The launches of k_center, by a launcher that starts kernels on a stream or, in the tests, runs them on the host.
#pragma once
#include "k_center/cluster_kernel.cuh"

namespace fastok::cuda {

using ClusterKernel = void (*)(CenterParams, ClusterPlan);

template <class T>
ClusterKernel cluster_kernel_of(bool cosine, bool max_sum) {
  if (cosine) return max_sum ? cluster_kernel<T, true, true> : cluster_kernel<T, true, false>;
  return max_sum ? cluster_kernel<T, false, true> : cluster_kernel<T, false, false>;
}

// Rows whose channels can be read by fours.
template <class T>
bool rows_by_fours(const CenterParams& p) {
  return p.width % 4 == 0 && p.row_stride % 4 == 0 && p.batch_stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(p.x) % (4 * sizeof(T)) == 0;
}

template <class T, class Launch>
void run_k_center_of(Launch& launch, const CenterPlan& plan, const CenterParams& p) {
  constexpr int kWarps = kCenterThreads / kWarpSize;
  constexpr unsigned kMostGridYZ = 65535;
  const unsigned warps = unsigned((int64_t(p.batch) * p.n + kWarps - 1) / kWarps);
  const unsigned samples = unsigned(p.batch) < kMostGridYZ ? unsigned(p.batch) : kMostGridYZ;
  const unsigned tiles = unsigned((p.n + kProductTile - 1) / kProductTile);
  const size_t scratch = shared_bytes<double>(32) + shared_bytes<int>(32);
  launch(dim3(warps), dim3(kCenterThreads), size_t(0), measure_kernel<T>, p);
  if (p.cosine && (plan.gram || p.isolation)) {
    constexpr size_t bytes = 2 * shared_bytes<double>(kProductSlice);
    launch(dim3(tiles, tiles, samples), dim3(kProductThreads), bytes, products_kernel<T>, p);
  } else if (p.isolation) {
    launch(dim3(warps), dim3(kCenterThreads), size_t(0), isolation_kernel<T>, p);
  }
  if (plan.gram) return launch(dim3(unsigned(p.batch)), dim3(kPickThreads), plan.pick_bytes, pick_kernel, p);
  if (ClusterPlan cluster = plan.cluster; cluster.blocks > 0) {
    cluster.by_fours = rows_by_fours<T>(p);
    return launch.clusters(unsigned(cluster.blocks), dim3(unsigned(p.batch * cluster.blocks)),
                           dim3(unsigned(cluster.warps * kWarpSize)), cluster.bytes,
                           cluster_kernel_of<T>(p.cosine, p.max_sum), p, cluster);
  }
  for (int step = 0; step < p.k; ++step)
    launch(dim3(unsigned(p.token_blocks), samples), dim3(kCenterThreads), scratch, step_kernel<T>, p, step);
}

template <class Launch>
void run_k_center(Launch&& launch, Dtype dtype, const CenterPlan& plan, const CenterParams& p) {
  switch (dtype) {
    case Dtype::f16:
      return run_k_center_of<f16>(launch, plan, p);
    case Dtype::bf16:
      return run_k_center_of<bf16>(launch, plan, p);
    default:
      return run_k_center_of<float>(launch, plan, p);
  }
}

}  // namespace fastok::cuda
