// CUDA backend of decode over packed caches: checks and launches. Kernels are in packed_kernel.cuh.
#include <tuple>

#include "decode/decode_call_cuda.h"
#include "decode/packed_launch.h"
#include "quantize/cache_cuda.h"

namespace fastok::cuda {
namespace {

std::tuple<Tensor, Tensor> decode_packed(Tensor q, Tensor data_in, Tensor offset, Tensor counts,
                                         std::optional<Tensor> classes, std::optional<Tensor> key_channels,
                                         std::optional<Tensor> value_channels, Tensor hot_k, Tensor hot_v,
                                         Tensor hot_len, std::vector<int64_t> ints, double scale, double softcap,
                                         std::optional<Tensor> key_bias, std::optional<Tensor> tokens) {
  const PackedTensors cache(data_in, offset, counts, classes, key_channels, value_channels, hot_k, hot_v, hot_len,
                            ints);
  STD_TORCH_CHECK(
      q.dim() == 4 && q.size(0) == cache.batch && q.size(3) == cache.width && dtype_of(q, "q") == cache.dtype,
      "q must have the batch size, the head dim and the dtype of the cache");
  check_on_device(hot_k, "hot_k", q, "q");
  const int64_t batch = q.size(0), rows = q.size(1), heads = q.size(2);
  STD_TORCH_CHECK(cache.groups > 0 && heads % cache.groups == 0, "the cache's heads must divide those of q");
  check_countable(rows * heads, "q's rows times heads");
  const Tensor out = empty_like_device(q, {batch, rows, heads, cache.width}, q.scalar_type());
  const Tensor lse = empty_like_device(q, {batch, heads, rows}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  check_grid(batch * heads * (rows + 1), "q");

  PackedParams params{};
  params.cache = cache.view;
  DecodeParams& p = params.decode;
  const Tensor queries = aligned_rows(q, cache.dtype);
  p.q = heads_of(queries);
  p.rule = logit_rule(scale, softcap, false);
  p.rows = int(rows), p.heads = int(heads), p.group = int(heads / cache.groups);
  p.width = p.v_width = int(cache.width), p.total = int(packed_capacity(cache.view));
  if (key_bias) {
    const int64_t places = key_bias->size(key_bias->dim() - 1);
    check_countable(places, "T");
    if (key_bias->dim() == 3) {
      check_shape(*key_bias, "key_bias", {batch, heads, places});
    } else {
      check_shape(*key_bias, "key_bias", {batch, places});
    }
    p.bias = numbers_of(key_bias, false, "key_bias", q);
    params.bias_places = int(places);
  }
  Launcher launch(q);
  OrderedTokens ordered;
  if (tokens) ordered.order(launch, *tokens, q, p);
  p.out = out.mutable_data_ptr(), p.lse = data<float>(lse), p.lse_rows = lse.numel();
  const PackedPlan plan = plan_for(params, cache.dtype);
  SplitParts parts(q, plan.splits, p);
  run_packed(launch, cache.dtype, batch, plan, params);
  return {out, lse};
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) { m.impl("decode_packed", TORCH_BOX(&fastok::cuda::decode_packed)); }
