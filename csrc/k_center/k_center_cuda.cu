// CUDA backend of k_center: checks, plan, working memory, launches.
#include <algorithm>
#include <string>
#include <tuple>

#include "common/launch.h"
#include "k_center/k_center_launch.h"

namespace fastok::cuda {
namespace {

// Capturable in a graph: torch's allocator serves working memory, and nothing waits.
std::tuple<Tensor, Tensor> k_center(Tensor x, int64_t k, std::string metric, std::string objective, std::string start,
                                    std::optional<Tensor> first, std::optional<Tensor> mask, int64_t) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B,N,D]");
  STD_TORCH_CHECK(metric == "cosine" || metric == "euclidean", "metric must be cosine or euclidean; got ", metric);
  STD_TORCH_CHECK(objective == "max_min" || objective == "max_sum", "objective must be max_min or max_sum; got ",
                  objective);
  STD_TORCH_CHECK(start == "isolated" || start == "norm" || start == "first" || (start == "given" && first.has_value()),
                  "start must be isolated, norm, first, or given with first; got ", start);
  const Dtype dtype = dtype_of(x, "x");
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(k >= 0, "k must not be negative, got ", k);
  for (const int64_t count : {batch, n, width}) check_countable(count, "each of B, N and D");
  check_grid((batch * n + 7) / 8, "x");
  const Tensor index = empty_like_device(x, {batch, k}, ScalarType::Long);
  const Tensor distance = empty_like_device(x, {batch, k}, ScalarType::Float);
  if (batch * k == 0) return {index, distance};

  CenterParams p{};
  const Tensor rows = with_dense_rows(x);
  p.x = rows.const_data_ptr(), p.batch_stride = rows.stride(0), p.row_stride = rows.stride(1);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask must be bool");
    check_shape(*mask, "mask", {batch, n});
    check_on_device(*mask, "mask", x, "x");
    p.mask = const_data<bool>(*mask), p.mask_batch_stride = mask->stride(0), p.mask_stride = mask->stride(1);
  }
  if (first) {
    STD_TORCH_CHECK(first->scalar_type() == ScalarType::Long, "first must be int64");
    check_shape(*first, "first", {batch});
    check_on_device(*first, "first", x, "x");
    p.first = const_data<int64_t>(*first), p.first_stride = first->stride(0);
  }
  p.batch = int(batch), p.n = int(n), p.width = int(width), p.k = int(k);
  p.cosine = metric == "cosine", p.max_sum = objective == "max_sum";
  p.start = start == "isolated" ? CenterStart::isolated : start == "norm" ? CenterStart::norm : CenterStart::given;

  Launcher launch(x);
  const bool isolated = p.start == CenterStart::isolated;
  const CenterPlan plan = plan_k_center({batch, n, width, k, p.cosine, p.max_sum, isolated},
                                        {arch_of(cluster_kernel<float, true, false>), most_shared_bytes(x)});
  check_grid(batch * std::max(plan.cluster.blocks, 1), "x");
  p.token_blocks = plan.token_blocks;
  const auto floats = [&](int64_t count) { return empty_like_device(x, {count}, ScalarType::Float); };
  const auto doubles = [&](int64_t count) { return empty_like_device(x, {count}, ScalarType::Double); };
  const auto ints = [&](int64_t count) { return empty_like_device(x, {count}, ScalarType::Int); };
  const int64_t streamed = plan.launch_per_pick() ? 2 * batch * plan.token_blocks : 0;
  const Tensor scale = floats(batch * n), norm = doubles(batch * n), rank = doubles(batch * n);
  const Tensor isolation = ints(isolated ? batch * n : 0), gram = floats(int64_t(plan.gram_numbers));
  const Tensor value = doubles(plan.global_values() ? batch * n : 0), best_value = doubles(streamed),
               best_token = ints(streamed);
  p.scale = data<float>(scale), p.norm = data<double>(norm), p.rank = data<double>(rank);
  p.isolation = isolated ? data<int>(isolation) : nullptr, p.gram = plan.gram ? data<float>(gram) : nullptr;
  p.value = plan.global_values() ? data<double>(value) : nullptr;
  p.best_value = data<double>(best_value), p.best_token = data<int>(best_token);
  p.index = data<int64_t>(index), p.distance = data<float>(distance);
  run_k_center(launch, dtype, plan, p);
  return {index, distance};
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) { m.impl("k_center", TORCH_BOX(&fastok::cuda::k_center)); }
