// CUDA backend of bipartite_match and nearest: checks and launches. Kernels are in match_kernel.cuh,
// nearest_kernel.cuh.
#include <string>
#include <tuple>

#include "common/launch.h"
#include "match/match_launch.h"

namespace fastok::cuda {
namespace {

using Map = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Similarity similarity_of(const std::string& similarity) {
  if (similarity == "cosine") return Similarity::cosine;
  if (similarity == "dot") return Similarity::dot;
  STD_TORCH_CHECK(similarity == "euclidean", "similarity must be cosine, dot or euclidean, got ", similarity);
  return Similarity::euclidean;
}

bool aligned(const Tensor& x, Dtype dtype) {
  return rows_aligned(x.const_data_ptr(), x.stride(0), x.stride(1), 0, element_size(dtype));
}

// A list of positions fit for a kernel, the last dimension contiguous.
Tensor checked_list(const Tensor& list, const char* name, const Tensor& metric) {
  STD_TORCH_CHECK(list.scalar_type() == ScalarType::Long, name, " must be int64");
  STD_TORCH_CHECK(list.dim() == 1 || (list.dim() == 2 && list.size(0) == metric.size(0)), name,
                  " must be [K] or [B,K]");
  check_on_device(list, name, metric, "metric");
  check_countable(list.size(list.dim() - 1), name);
  return with_dense_rows(list);
}

BatchPositions positions_of(const Tensor& list) {
  const int64_t last = list.dim() - 1;
  return {const_data<int64_t>(list), last == 0 ? 0 : list.stride(0), 0, 1, int(list.size(last))};
}

// Every second token.
BatchPositions alternate(int64_t n, int first) { return {nullptr, 0, first, 2, int((n + 1 - first) / 2)}; }

Map bipartite_match(Tensor metric, int64_t r, int64_t protect, std::optional<double> threshold,
                    std::optional<Tensor> bias, std::optional<Tensor> src, std::optional<Tensor> dst, bool sorted_order,
                    bool static_shape) {
  STD_TORCH_CHECK(metric.dim() == 3, "metric must be [B,N,D]");
  const Dtype dtype = dtype_of(metric, "metric");
  const int64_t batch = metric.size(0), n = metric.size(1), width = metric.size(2);
  STD_TORCH_CHECK(protect >= 0 && protect <= n, "protect must be within [0, N], got ", protect);
  STD_TORCH_CHECK(src.has_value() == dst.has_value(), "src and dst must be given together");
  check_countable(n, "N");
  check_countable(width, "D");

  MatchParams p{};
  Tensor sources, destinations;
  p.src = alternate(n, 0), p.dst = alternate(n, 1);
  if (src) {
    sources = checked_list(*src, "src", metric), destinations = checked_list(*dst, "dst", metric);
    p.src = positions_of(sources), p.dst = positions_of(destinations);
    STD_TORCH_CHECK(p.src.count + int64_t(p.dst.count) <= n, "src and dst must be disjoint, got ", p.src.count, " and ",
                    p.dst.count, " positions for ", n, " tokens");
  }
  const bool merges = r > 0 && p.src.count > 0 && p.dst.count > 0;
  STD_TORCH_CHECK(!merges || r <= p.src.count, "r must be at most the number of sources, ", p.src.count, "; got ", r);
  STD_TORCH_CHECK(!merges || static_shape || threshold,
                  "static_shape must be true on CUDA unless there is a threshold");
  const int64_t n_out = merges && !threshold ? n - r : n;

  const Tensor assign = empty_like_device(metric, {batch, n}, ScalarType::Int);
  const Tensor counts = empty_like_device(metric, {batch}, ScalarType::Int);
  const Tensor offsets = empty_like_device(metric, {batch, n_out + 1}, ScalarType::Int);
  const Tensor members = empty_like_device(metric, {batch, n}, ScalarType::Int);
  p.assign = data<int32_t>(assign), p.counts = data<int32_t>(counts);
  p.offsets = data<int32_t>(offsets), p.members = data<int32_t>(members);
  if (batch == 0) return {assign, counts, offsets, members};
  Launcher launch(metric);
  if (!merges) {
    check_grid(batch * (n + 1) / 256 + 1, "metric");
    run_identity(launch, batch, n, p.assign, p.counts, p.offsets, p.members);
    return {assign, counts, offsets, members};
  }

  STD_TORCH_CHECK(n <= kMostTokens, "metric must have at most ", kMostTokens, " tokens, got ", n);
  check_grid(batch * ((n + 15) / 16), "metric");
  const Tensor rows = with_dense_rows(metric);
  p.metric = rows.const_data_ptr(), p.batch_stride = rows.stride(0), p.row_stride = rows.stride(1);
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, "bias must be float32");
    check_shape(*bias, "bias", {batch, n});
    check_on_device(*bias, "bias", metric, "metric");
    p.bias = const_data<float>(*bias), p.bias_batch_stride = bias->stride(0), p.bias_stride = bias->stride(1);
  }
  p.n = int(n), p.n_out = int(n_out), p.r = int(r), p.protect = int(protect);
  p.by_threshold = threshold.has_value(), p.threshold = float(threshold.value_or(0)), p.sorted_order = sorted_order;
  p.shape.width = int(width);
  run_match(launch, dtype, batch, aligned(rows, dtype), p);
  return {assign, counts, offsets, members};
}

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor y, int64_t k, std::string similarity, std::optional<Tensor> mask) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B,N,D]");
  const Dtype dtype = dtype_of(x, "x");
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(y.dim() == 3 && y.size(0) == batch && y.size(2) == width, "y must be [B,M,D]");
  STD_TORCH_CHECK(y.scalar_type() == x.scalar_type(), "y must have the dtype of x");
  const int64_t m = y.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= m, "k must be within [1, M], got ", k);
  check_on_device(y, "y", x, "x");
  for (const int64_t count : {n, m, width}) check_countable(count, "each of N, M and D");
  check_grid(batch * ((n + 15) / 16), "x");

  NearestParams p{};
  const Tensor rows = with_dense_rows(x), columns = with_dense_rows(y);
  const Tensor value = empty_like_device(x, {batch, n, k}, ScalarType::Float);
  const Tensor index = empty_like_device(x, {batch, n, k}, ScalarType::Long);
  p.x = rows.const_data_ptr(), p.x_batch_stride = rows.stride(0), p.x_row_stride = rows.stride(1);
  p.y = columns.const_data_ptr(), p.y_batch_stride = columns.stride(0), p.y_row_stride = columns.stride(1);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    check_shape(*mask, "mask", {batch, m});
    check_on_device(*mask, "mask", x, "x");
    p.mask = const_data<bool>(*mask), p.mask_batch_stride = mask->stride(0), p.mask_stride = mask->stride(1);
  }
  p.n = int(n), p.m = int(m), p.width = int(width), p.k = int(k);
  p.similarity = similarity_of(similarity);
  p.value = data<float>(value), p.index = data<int64_t>(index);
  if (batch * n > 0) run_nearest(Launcher(x), dtype, batch, aligned(rows, dtype) && aligned(columns, dtype), p);
  return {value, index};
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) {
  m.impl("bipartite_match", TORCH_BOX(&fastok::cuda::bipartite_match));
  m.impl("nearest", TORCH_BOX(&fastok::cuda::nearest));
}
