// CUDA backend of max_coverage: checks, plan, working memory, launches.
#include <tuple>

#include "common/launch.h"
#include "max_coverage/max_coverage_launch.h"

namespace fastok::cuda {
namespace {

// Capturable in a graph: torch's allocator serves working memory, and nothing waits.
std::tuple<Tensor, Tensor> max_coverage(std::optional<Tensor> similarity, std::optional<Tensor> y,
                                        std::optional<Tensor> x, int64_t k, std::optional<Tensor> modular) {
  STD_TORCH_CHECK(similarity.has_value() != (y.has_value() && x.has_value()), "give similarity, or y and x");
  const Tensor like = similarity ? *similarity : *x;
  STD_TORCH_CHECK(like.dim() == 3, "similarity must be [B,R,N], x [B,N,D]");
  const Dtype dtype = dtype_of(like, "similarity");
  const int64_t batch = like.size(0), n = like.size(similarity ? 2 : 1);
  const int64_t width = similarity ? 0 : x->size(2);
  if (!similarity) {
    STD_TORCH_CHECK(y->dim() == 3 && y->size(0) == batch && y->size(2) == width, "y must be [B,R,D]");
    STD_TORCH_CHECK(y->scalar_type() == x->scalar_type(), "y and x must have the same dtype");
    check_on_device(*y, "y", *x, "x");
  }
  const int64_t rows = similarity ? like.size(1) : y->size(1);
  STD_TORCH_CHECK(k >= 0 && k <= n, "k must be within [0, N=", n, "], got ", k);
  for (const int64_t count : {batch, rows, n, width}) check_countable(count, "each of B, R, N and D");
  check_grid((batch * std::max(rows, n) + 7) / 8, "similarity");
  const Tensor index = empty_like_device(like, {batch, k}, ScalarType::Long);
  const Tensor gain = empty_like_device(like, {batch, k}, ScalarType::Float);
  if (batch * k == 0) return {index, gain};

  CoverageParams p{};
  p.batch = int(batch), p.rows = int(rows), p.n = int(n), p.width = int(width), p.k = int(k);
  if (modular) {
    STD_TORCH_CHECK(modular->scalar_type() == ScalarType::Float, "modular must be float32");
    check_shape(*modular, "modular", {batch, n});
    check_on_device(*modular, "modular", like, "similarity");
    p.modular = const_data<float>(*modular);
    p.modular_batch_stride = modular->stride(0), p.modular_stride = modular->stride(1);
  }
  p.pair = !similarity;
  const CoveragePlan& plan = p.plan = plan_max_coverage(batch, rows, n, p.pair);
  const auto floats = [&](int64_t count) { return empty_like_device(like, {count}, ScalarType::Float); };
  const auto doubles = [&](int64_t count) { return empty_like_device(like, {count}, ScalarType::Double); };
  const auto ints = [&](int64_t count) { return empty_like_device(like, {count}, ScalarType::Int); };
  Tensor y_rows, x_rows;
  if (similarity) {
    p.matrix = like.const_data_ptr(), p.matrix_batch_stride = like.stride(0);
    p.matrix_row_stride = like.stride(1), p.matrix_stride = like.stride(2);
  } else {
    y_rows = with_dense_rows(*y), x_rows = with_dense_rows(*x);
    p.y = y_rows.const_data_ptr(), p.y_batch_stride = y_rows.stride(0), p.y_row_stride = y_rows.stride(1);
    p.x = x_rows.const_data_ptr(), p.x_batch_stride = x_rows.stride(0), p.x_row_stride = x_rows.stride(1);
  }
  const Tensor y_scale = floats(similarity ? 0 : batch * rows), y_norm = doubles(similarity ? 0 : batch * rows);
  const Tensor x_scale = floats(similarity ? 0 : batch * n), x_norm = doubles(similarity ? 0 : batch * n);
  const Tensor kept = floats(plan.kept ? batch * rows * n : 0), peak = ints(batch), runner_up = ints(batch);
  const Tensor covered = doubles(batch * rows), runner_up_gain = doubles(batch * plan.row_blocks);
  const Tensor rank = empty_like_device(like, {2 * batch * n}, ScalarType::Long);
  p.y_scale = data<float>(y_scale), p.y_norm = data<double>(y_norm);
  p.x_scale = data<float>(x_scale), p.x_norm = data<double>(x_norm);
  p.kept = data<float>(kept), p.peak = data<int>(peak), p.covered = data<double>(covered);
  p.rank = reinterpret_cast<uint64_t*>(data<int64_t>(rank));
  p.runner_up = data<int>(runner_up), p.runner_up_gain = data<double>(runner_up_gain);
  p.index = data<int64_t>(index), p.gain = data<float>(gain);
  run_max_coverage(Launcher(like), dtype, p);
  return {index, gain};
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) { m.impl("max_coverage", TORCH_BOX(&fastok::cuda::max_coverage)); }
