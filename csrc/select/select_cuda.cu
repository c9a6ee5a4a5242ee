// CUDA backend of top_tokens, sample_cdf and density_peaks: checks and launches. Kernels are in select_kernel.cuh and
// peaks_kernel.cuh.
#include <tuple>
#include <vector>

#include "common/launch.h"
#include "select/select_launch.h"

namespace fastok::cuda {
namespace {

// Memory that kernels use on the way; torch's allocator keeps it for work already on the stream.
template <class T>
T* working(std::vector<Tensor>& held, const Tensor& like, int64_t count, ScalarType dtype) {
  held.push_back(empty_like_device(like, {count}, dtype));
  return data<T>(held.back());
}

Tensor top_tokens(Tensor scores, std::vector<int64_t> k, int64_t protect, std::optional<Tensor> mask,
                  std::optional<Tensor> segments, bool by_score) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores must be [B,N]");
  const Dtype dtype = dtype_of(scores, "scores");
  const int64_t batch = scores.size(0), n = scores.size(1), n_segments = int64_t(k.size());
  int64_t total = 0;
  for (const int64_t budget : k) {
    STD_TORCH_CHECK(budget >= 0, "k must be >= 0, got ", budget);
    total += budget;
  }
  STD_TORCH_CHECK(protect >= 0 && total <= n - protect, "protect + k must be within [0, N=", n, "], got ", protect,
                  " + ", total);
  STD_TORCH_CHECK(segments || n_segments == 1, "k must be one budget without segments, got ", n_segments);
  check_countable(n, "N");
  check_grid(batch * (n + 256), "scores");

  TopParams p{};
  std::vector<Tensor> held;
  p.scores = scores.const_data_ptr(), p.batch_stride = scores.stride(0), p.stride = scores.stride(1);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    check_shape(*mask, "mask", {batch, n});
    check_on_device(*mask, "mask", scores, "scores");
    p.mask = const_data<bool>(*mask), p.mask_batch_stride = mask->stride(0), p.mask_stride = mask->stride(1);
  }
  const Tensor index = empty_like_device(scores, {batch, protect + total}, ScalarType::Long);
  if (batch * (protect + total) == 0) return index;
  if (segments) {
    STD_TORCH_CHECK(segments->scalar_type() == ScalarType::Long, "segments must be int64");
    check_shape(*segments, "segments", {batch, n});
    check_on_device(*segments, "segments", scores, "scores");
    p.segments = const_data<int64_t>(*segments);
    p.segment_batch_stride = segments->stride(0), p.segment_stride = segments->stride(1);
    const int64_t ints = batch * n_segments * int64_t(sizeof(Cut) / sizeof(int32_t));
    p.cuts = reinterpret_cast<Cut*>(working<int32_t>(held, scores, ints, ScalarType::Int));
  }
  if (needs_picks(total, by_score)) p.picks = working<int64_t>(held, scores, batch * total, ScalarType::Long);
  p.n = int(n), p.protect = int(protect), p.total = int(total), p.n_segments = int(n_segments), p.by_score = by_score;
  p.out = data<int64_t>(index);
  run_top(Launcher(scores), dtype, batch, k.data(), p);
  return index;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_cdf(Tensor scores, int64_t k, int64_t protect) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores must be [B,N]");
  const Dtype dtype = dtype_of(scores, "scores");
  const int64_t batch = scores.size(0), n = scores.size(1), n_out = k < n ? k : n;
  STD_TORCH_CHECK(protect >= 0 && protect <= n && protect <= k, "protect must be within [0, N] and [0, k], got ",
                  protect);
  STD_TORCH_CHECK(n - protect <= kMostSampled, "scores must have at most ", kMostSampled,
                  " unprotected tokens on CUDA, got ", n - protect);
  check_grid(batch, "scores");
  const Tensor assign = empty_like_device(scores, {batch, n}, ScalarType::Int);
  const Tensor counts = empty_like_device(scores, {batch}, ScalarType::Int);
  const Tensor offsets = empty_like_device(scores, {batch, n_out + 1}, ScalarType::Int);
  const Tensor members = empty_like_device(scores, {batch, n}, ScalarType::Int);
  if (batch == 0) return {assign, counts, offsets, members};

  SampleParams p{};
  std::vector<Tensor> held;
  p.scores = scores.const_data_ptr(), p.batch_stride = scores.stride(0), p.stride = scores.stride(1);
  p.n = int(n), p.n_out = int(n_out), p.protect = int(protect), p.heights = k - protect;
  if (n - protect > kSampledInBlock) {
    const int64_t width = power_of_two(n - protect);
    p.order = reinterpret_cast<uint64_t*>(working<int64_t>(held, scores, batch * width, ScalarType::Long));
    p.total = working<double>(held, scores, batch * width, ScalarType::Double);
  }
  p.assign = data<int32_t>(assign), p.counts = data<int32_t>(counts);
  p.offsets = data<int32_t>(offsets), p.members = data<int32_t>(members);
  run_sample(Launcher(scores), dtype, batch, p);
  return {assign, counts, offsets, members};
}

Tensor density_peaks(Tensor x, int64_t k, int64_t neighbors) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B,N,D]");
  const Dtype dtype = dtype_of(x, "x");
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(k >= 0 && k <= n, "k must be within [0, N=", n, "], got ", k);
  STD_TORCH_CHECK(neighbors >= 1 && (neighbors <= n || n == 0), "neighbors must be within [1, N=", n, "], got ",
                  neighbors);
  check_countable(n, "N");
  check_countable(width, "D");
  check_grid(batch * n, "x");
  const Tensor rows = with_dense_rows(x);
  const Tensor index = empty_like_device(x, {batch, k}, ScalarType::Long);
  if (batch * k == 0) return index;

  PeaksParams p{};
  std::vector<Tensor> held;
  p.x = rows.const_data_ptr(), p.batch_stride = rows.stride(0), p.row_stride = rows.stride(1);
  p.n = int(n), p.width = int(width), p.neighbors = int(neighbors);
  p.value = working<float>(held, x, batch * n * neighbors, ScalarType::Float);
  p.index = working<int64_t>(held, x, batch * n * neighbors, ScalarType::Long);
  p.spread = working<double>(held, x, batch * n, ScalarType::Double);
  p.peaks = working<int64_t>(held, x, batch * n, ScalarType::Long);
  p.peak_count = working<int32_t>(held, x, batch, ScalarType::Int);
  p.score = working<float>(held, x, batch * n, ScalarType::Float);
  int64_t* const picks = needs_picks(k, true) ? working<int64_t>(held, x, batch * k, ScalarType::Long) : nullptr;
  run_peaks(Launcher(x), dtype, batch, k, picks, data<int64_t>(index), p);
  return index;
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) {
  m.impl("top_tokens", TORCH_BOX(&fastok::cuda::top_tokens));
  m.impl("sample_cdf", TORCH_BOX(&fastok::cuda::sample_cdf));
  m.impl("density_peaks", TORCH_BOX(&fastok::cuda::density_peaks));
}
