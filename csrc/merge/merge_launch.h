// Which merging kernels run, with what; each op is one launch. `launch` starts kernels: launch(grid, block, shared
// bytes, kernel, arguments...); the CUDA binding and the host harness each bring their own.
#pragma once
#include "merge/merge_kernel.cuh"

namespace fastok::cuda {

enum class RowOp { merge, backward, max_backward, unmerge };

template <class T, int kVector>
auto row_kernel(RowOp op) {
  switch (op) {
    case RowOp::merge:
      return &merge_kernel<T, kVector>;
    case RowOp::backward:
      return &merge_backward_kernel<T, kVector>;
    case RowOp::max_backward:
      return &merge_max_backward_kernel<T, kVector>;
    default:
      return &unmerge_kernel<T, kVector>;
  }
}

template <class T, class Launch>
void run_rows_of(Launch& launch, RowOp op, int64_t rows, bool aligned, MergeParams p) {
  constexpr int kWide = 16 / int(sizeof(T));
  constexpr int64_t kMostGridY = 65535;
  const RowPlan plan = plan_rows(rows, p.channels, sizeof(T), aligned);
  p.lanes = plan.lanes;
  const dim3 grid(unsigned(plan.row_blocks), unsigned(p.batch < kMostGridY ? p.batch : kMostGridY));
  launch(grid, dim3(kRowThreads), size_t(0), aligned ? row_kernel<T, kWide>(op) : row_kernel<T, 1>(op), p);
}

// `aligned`: every array of rows that the op touches can be moved 16 bytes at a time. unmerge writes p.x.
template <class Launch>
void run_rows(Launch&& launch, RowOp op, Dtype dtype, bool aligned, const MergeParams& p) {
  const int64_t rows = op == RowOp::merge ? p.n_out : op == RowOp::max_backward ? int64_t(p.n_out) + p.n : p.n;
  switch (dtype) {
    case Dtype::f16:
      return run_rows_of<f16>(launch, op, rows, aligned, p);
    case Dtype::bf16:
      return run_rows_of<bf16>(launch, op, rows, aligned, p);
    case Dtype::f64:
      return run_rows_of<double>(launch, op, rows, aligned, p);
    default:
      return run_rows_of<float>(launch, op, rows, aligned, p);
  }
}

template <class Launch>
void run_build_map(Launch&& launch, int64_t batch, int64_t n, int64_t n_out, const int32_t* assign, int32_t* offsets,
                   int32_t* members) {
  const MapPlan plan = plan_map(n, n_out);
  launch(dim3(unsigned(batch)), dim3(unsigned(plan.threads)), plan.bytes, build_map_kernel, assign, int(n), int(n_out),
         plan.csr, offsets, members);
}

}  // namespace fastok::cuda
