// The tensors of a packed cache as the CUDA ops take them, checked as far as that takes no look at the device.
#pragma once
#include <vector>

#include "attention/call_cuda.h"
#include "quantize/packed_cache.cuh"

namespace fastok::cuda {

inline KvFormat checked_format(const std::vector<int64_t>& ints, int64_t width) {
  KvFormat fmt;
  STD_TORCH_CHECK(KvFormat::of(ints.data(), ints.size(), width, fmt), "fmt is no packed KV format for head dim ",
                  width);
  return fmt;
}

// channels[B,G,D] of a side that needs them, nullptr for others; `held` keeps a copy alive.
inline const f16* checked_channels(const KvSide& side, const std::optional<Tensor>& channels, int64_t batch,
                                   int64_t groups, const char* name, const Tensor& like, Tensor& held) {
  if (!side.needs_channels()) return nullptr;
  STD_TORCH_CHECK(channels.has_value(), name, " must be given for this format");
  check_on_device(*channels, name, like, "the other arguments");
  held = checked_contiguous(*channels, ScalarType::Half, name);
  check_shape(held, name, {batch, groups, side.width});
  return const_data<f16>(held);
}

inline void copy_strides(const Tensor& x, int64_t (&strides)[3]) {
  for (int64_t i = 0; i < 3; ++i) strides[i] = x.stride(i);
}

struct PackedTensors {
  Tensor data, counts, classes, channels[2], hot[2], hot_len;
  Dtype dtype;
  int64_t batch, groups, width;
  PackedView view{};

  PackedTensors(const Tensor& data_in, const Tensor& offset, const Tensor& counts_in,
                const std::optional<Tensor>& classes_in, const std::optional<Tensor>& key_channels,
                const std::optional<Tensor>& value_channels, const Tensor& hot_k, const Tensor& hot_v,
                const Tensor& hot_len_in, const std::vector<int64_t>& ints)
      : data(checked_contiguous(data_in, ScalarType::Byte, "data")),
        counts(counts_in),
        hot_len(checked_contiguous(hot_len_in, ScalarType::Int, "hot_len")),
        dtype(dtype_of(hot_k, "hot_k")) {
    STD_TORCH_CHECK(hot_k.dim() == 4 && hot_v.scalar_type() == hot_k.scalar_type(), "hot_k and hot_v must be alike");
    batch = hot_k.size(0), groups = hot_k.size(1), width = hot_k.size(3);
    view.fmt = checked_format(ints, width);
    STD_TORCH_CHECK(offset.scalar_type() == ScalarType::Long && offset.dim() == 3, "offset must be int64 [B,G,pages]");
    const int64_t pages = offset.size(2);
    check_shape(offset, "offset", {batch, groups, pages});
    STD_TORCH_CHECK(counts.scalar_type() == ScalarType::Short, "counts must be int16");
    check_shape(counts, "counts", {batch, groups, pages, view.fmt.token_groups});
    if (view.fmt.token_groups > 1 && counts.stride(3) != 1) counts = torch::stable::contiguous(counts);
    STD_TORCH_CHECK(classes_in.has_value() == view.fmt.two_classes,
                    "classes must be given for formats of two classes only");
    if (view.fmt.two_classes) {
      classes = *classes_in;
      STD_TORCH_CHECK(classes.scalar_type() == ScalarType::Byte, "classes must be uint8");
      check_shape(classes, "classes", {batch, groups, pages, (view.fmt.page + 7) / 8});
      if (classes.stride(3) != 1) classes = torch::stable::contiguous(classes);
      check_on_device(classes, "classes", hot_k, "hot_k");
      view.classes = const_data<uint8_t>(classes);
      copy_strides(classes, view.classes_strides);
    }
    check_shape(hot_len, "hot_len", {batch, groups});
    check_on_device(data, "data", hot_k, "hot_k");
    check_on_device(offset, "offset", hot_k, "hot_k");
    check_on_device(counts, "counts", hot_k, "hot_k");
    check_on_device(hot_len, "hot_len", hot_k, "hot_k");
    check_on_device(hot_v, "hot_v", hot_k, "hot_k");
    check_countable(pages * view.fmt.page + hot_k.size(2), "places");
    // The first page of a cache decides what its channels are; before there is one they are not needed.
    if (pages > 0) {
      view.channels[0] =
          checked_channels(view.fmt.key, key_channels, batch, groups, "key_channels", hot_k, channels[0]);
      view.channels[1] =
          checked_channels(view.fmt.value, value_channels, batch, groups, "value_channels", hot_k, channels[1]);
    }
    if (reinterpret_cast<uintptr_t>(data.const_data_ptr()) % 16 != 0) data = torch::stable::clone(data);
    view.data = const_data<uint8_t>(data), view.bytes = data.numel();
    view.offset = const_data<int64_t>(offset), view.counts = const_data<int16_t>(counts);
    copy_strides(offset, view.offset_strides), copy_strides(counts, view.counts_strides);
    for (int which = 0; which < 2; ++which) {
      const Tensor& given = which ? hot_v : hot_k;
      check_shape(given, "hot_v", {batch, groups, hot_k.size(2), width});
      hot[which] = aligned_rows(given, dtype);
      view.hot[which] = hot[which].const_data_ptr();
      copy_strides(hot[which], view.hot_strides[which]);
    }
    view.hot_lengths = const_data<int32_t>(hot_len);
    view.groups = int(groups), view.pages = int(pages), view.window = int(hot_k.size(2));
  }
};

}  // namespace fastok::cuda
