// CUDA backend of kv_seal and kv_unseal: checks and launches. Kernels are in quantize_kernel.cuh.
#include <tuple>

#include "quantize/cache_cuda.h"
#include "quantize/quantize_launch.h"

namespace fastok::cuda {
namespace {

void kv_seal(Tensor data_out, Tensor offset_in, Tensor k, Tensor v, std::optional<Tensor> classes_in,
             std::optional<Tensor> key_channels, std::optional<Tensor> value_channels, std::vector<int64_t> ints,
             double key_gamma, double value_gamma) {
  const Dtype dtype = dtype_of(k, "k");
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "k and v must be [B,n*page,G,D]");
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type(), "v must have the dtype of k");
  const int64_t batch = k.size(0), groups = k.size(2), width = k.size(3);
  check_shape(v, "v", {batch, k.size(1), groups, width});
  SealParams p{};
  p.fmt = checked_format(ints, width);
  const Tensor offset = checked_contiguous(offset_in, ScalarType::Long, "offset");
  STD_TORCH_CHECK(offset.dim() == 3, "offset must be [B,G,n]");
  const int64_t pages = offset.size(2);
  check_shape(offset, "offset", {batch, groups, pages});
  STD_TORCH_CHECK(pages * p.fmt.page == k.size(1), "offset must be [B,G,n] for k [B,n*page,G,D]");
  STD_TORCH_CHECK(classes_in.has_value() == p.fmt.two_classes, "classes must be given for formats of two classes only");
  Tensor classes, channels[2];
  if (p.fmt.two_classes) {
    classes = checked_contiguous(*classes_in, ScalarType::Byte, "classes");
    check_shape(classes, "classes", {batch, groups, pages, (p.fmt.page + 7) / 8});
    check_on_device(classes, "classes", data_out, "data");
    p.classes = const_data<uint8_t>(classes);
  }
  STD_TORCH_CHECK(data_out.scalar_type() == ScalarType::Byte && data_out.dim() == 1 && data_out.is_contiguous(),
                  "data must be contiguous uint8 [bytes]");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data_out.const_data_ptr()) % 16 == 0,
                  "data must begin at a multiple of 16 bytes");
  check_on_device(offset, "offset", data_out, "data");
  p.channels[0] = checked_channels(p.fmt.key, key_channels, batch, groups, "key_channels", data_out, channels[0]);
  p.channels[1] = checked_channels(p.fmt.value, value_channels, batch, groups, "value_channels", data_out, channels[1]);
  if (offset.numel() == 0) return;
  check_grid(offset.numel(), "offset");
  const Tensor sources[2] = {with_dense_rows(k), with_dense_rows(v)};
  for (int which = 0; which < 2; ++which) {
    check_on_device(sources[which], which ? "v" : "k", data_out, "data");
    p.source[which] = sources[which].const_data_ptr();
    copy_strides(sources[which], p.strides[which]);
  }
  p.data = data<uint8_t>(data_out), p.bytes = data_out.numel(), p.offset = const_data<int64_t>(offset);
  p.gamma[0] = float(key_gamma), p.gamma[1] = float(value_gamma);
  p.groups = int(groups), p.pages = int(pages);
  run_kv_seal(Launcher(data_out), dtype, batch, p);
}

std::tuple<Tensor, Tensor> kv_unseal(Tensor data_in, Tensor offset, Tensor counts, std::optional<Tensor> classes,
                                     std::optional<Tensor> key_channels, std::optional<Tensor> value_channels,
                                     Tensor hot_k, Tensor hot_v, Tensor hot_len, std::vector<int64_t> ints,
                                     int64_t total) {
  const PackedTensors cache(data_in, offset, counts, classes, key_channels, value_channels, hot_k, hot_v, hot_len,
                            ints);
  STD_TORCH_CHECK(total >= 0, "total must be >= 0, got ", total);
  check_countable(total, "total");
  Tensor outs[2];
  for (Tensor& out : outs)
    out = empty_like_device(hot_k, {cache.batch, total, cache.groups, cache.width}, hot_k.scalar_type());
  if (outs[0].numel() == 0) return {outs[0], outs[1]};
  check_grid(cache.batch * cache.groups * (cache.view.pages + 1), "offset");
  UnsealParams p{};
  p.cache = cache.view, p.total = int(total);
  p.out[0] = outs[0].mutable_data_ptr(), p.out[1] = outs[1].mutable_data_ptr();
  run_kv_unseal(Launcher(hot_k), cache.dtype, cache.batch, p);
  return {outs[0], outs[1]};
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) {
  m.impl("kv_seal", TORCH_BOX(&fastok::cuda::kv_seal));
  m.impl("kv_unseal", TORCH_BOX(&fastok::cuda::kv_unseal));
}
