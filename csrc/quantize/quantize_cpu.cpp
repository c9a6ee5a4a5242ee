// CPU backend of kv_seal and kv_unseal: one task per page. The arithmetic is in quantize_simd.cpp.
#include <mutex>
#include <tuple>

#include "quantize/cache_cpu.h"
#include "quantize/spectrum.h"

namespace fastok {

const float* fourier_basis(int64_t n) {
  static std::mutex mutex;
  static std::unique_ptr<float[]> bases[9];  // by the logarithm of n
  const std::lock_guard lock(mutex);
  int log = 0;
  while (int64_t(1) << log < n) ++log;
  if (!bases[log]) {
    bases[log] = std::make_unique<float[]>(size_t(n * n));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= n / 2; ++j) bases[log][size_t(i * n + j)] = float(cosine(i * j, n));
      for (int64_t j = 1; j < n / 2; ++j) bases[log][size_t(i * n + n / 2 + j)] = float(cosine(i * j + n / 4, n));
    }
  }
  return bases[log].get();
}

namespace {

void kv_seal(Tensor data_out, Tensor offset_in, Tensor k, Tensor v, std::optional<Tensor> classes_in,
             std::optional<Tensor> key_channels, std::optional<Tensor> value_channels, std::vector<int64_t> ints,
             double key_gamma, double value_gamma) {
  const Dtype dtype = dtype_of(k, "k");
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "k and v must be [B,n*page,G,D]");
  const int64_t batch = k.size(0), groups = k.size(2), width = k.size(3);
  for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(v.size(d) == k.size(d), "v must be like k");
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type(), "v must have the dtype of k");
  const KvFormat fmt = checked_format(ints, width);
  const Tensor offset = checked_contiguous(offset_in, ScalarType::Long, "offset");
  STD_TORCH_CHECK(offset.dim() == 3 && offset.size(0) == batch && offset.size(1) == groups &&
                      offset.size(2) * fmt.page == k.size(1),
                  "offset must be [B,G,n] for k [B,n*page,G,D]");
  const int64_t pages = offset.size(2), class_bytes = (fmt.page + 7) / 8;
  STD_TORCH_CHECK(classes_in.has_value() == fmt.two_classes, "classes must be given for formats of two classes only");
  Tensor classes;
  if (fmt.two_classes) {
    classes = checked_contiguous(*classes_in, ScalarType::Byte, "classes");
    STD_TORCH_CHECK(classes.numel() == batch * groups * pages * class_bytes, "classes must be [B,G,n,ceil(page/8)]");
  }
  STD_TORCH_CHECK(data_out.scalar_type() == ScalarType::Byte && data_out.dim() == 1 && data_out.is_contiguous(),
                  "data must be contiguous uint8 [bytes]");
  const SideChannels of_keys(fmt.key, key_channels, batch, groups, "key_channels");
  const SideChannels of_values(fmt.value, value_channels, batch, groups, "value_channels");
  k = with_dense_rows(k);
  v = with_dense_rows(v);
  uint8_t* const bytes = data<uint8_t>(data_out);
  const int64_t* const offsets = const_data<int64_t>(offset);
  const uint8_t* const bits = fmt.two_classes ? const_data<uint8_t>(classes) : nullptr;
  std::vector<int16_t> counts(size_t(fmt.token_groups), int16_t(fmt.page / fmt.token_groups));
  const auto classes_of = [&](int64_t i) { return bits ? bits + i * class_bytes : nullptr; };
  for (int64_t i = 0; i < batch * groups * pages; ++i) {
    const int64_t size = KvPage::of(fmt, bytes, counts.data(), classes_of(i)).size;
    STD_TORCH_CHECK(offsets[i] >= 0 && offsets[i] % 16 == 0 && offsets[i] + size <= data_out.numel(),
                    "offset must be multiples of 16 with room for a record in data, got ", offsets[i]);
  }
  const float gamma[2] = {float(key_gamma), float(value_gamma)};
  const QuantizeKernels& kernels = pick_quantize_kernels();
  torch::stable::parallel_for(0, batch * groups * pages, 1, [&](int64_t begin, int64_t end) {
    const AlignedMemory scratch(kernels.scratch_bytes(fmt));
    // The heads of a page one after the other: their tokens are neighbours, on the same pages of memory.
    const auto start = [&](const Tensor& x, int64_t task) {
      const int64_t g = task % groups, page = task / groups % pages, b = task / groups / pages;
      return b * x.stride(0) + page * fmt.page * x.stride(1) + g * x.stride(2);
    };
    const auto rows_of = [&](const Tensor& x, int64_t task) {
      const int64_t size = int64_t(element_size(dtype));
      const char* const base = static_cast<const char*>(x.const_data_ptr());
      KvRows rows{base + start(x, task) * size, x.stride(1), nullptr, 0};
      // Where heads lie beside each other, memory is fetched best in its order: of the next page, this task's share.
      const int64_t next = task - task % groups + groups;
      if (x.stride(2) == width && x.stride(1) == groups * width && next < end) {
        rows.ahead = base + (start(x, next) + task % groups * fmt.page * width) * size;
        rows.ahead_stride = width;
      } else {
        rows.ahead = base + start(x, task + 1 < end ? task + 1 : task) * size;
        rows.ahead_stride = x.stride(1);
      }
      return rows;
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task % groups, page = task / groups % pages, b = task / groups / pages;
      const int64_t i = (b * groups + g) * pages + page;
      const KvRows rows[2] = {rows_of(k, task), rows_of(v, task)};
      const KvChannels channels[2] = {of_keys.of(b, g), of_values.of(b, g)};
      kernels.seal(fmt, dtype, rows, channels, gamma, classes_of(i), bytes + offsets[i], scratch.get());
    }
  });
}

std::tuple<Tensor, Tensor> kv_unseal(Tensor data_in, Tensor offset, Tensor counts, std::optional<Tensor> classes,
                                     std::optional<Tensor> key_channels, std::optional<Tensor> value_channels,
                                     Tensor hot_k, Tensor hot_v, Tensor hot_len, std::vector<int64_t> ints,
                                     int64_t total) {
  const PackedCall call(data_in, offset, counts, classes, key_channels, value_channels, hot_k, hot_v, hot_len, ints);
  STD_TORCH_CHECK(total >= 0, "total must be >= 0, got ", total);
  const int64_t row_bytes = call.width * int64_t(element_size(call.dtype)), stride = call.groups * call.width;
  Tensor outs[2];
  for (Tensor& out : outs)
    out = empty_like_device(call.hot_k, {call.batch, total, call.groups, call.width}, call.hot_k.scalar_type());
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t g = 0; g < call.groups; ++g)
      STD_TORCH_CHECK(call.length(b, g) <= total, "total must be at least the longest length, ", call.length(b, g),
                      "; got ", total);
  const auto place = [&](int which, int64_t b, int64_t token, int64_t g) {
    return static_cast<char*>(outs[which].mutable_data_ptr()) + ((b * total + token) * call.groups + g) * row_bytes;
  };
  const QuantizeKernels& kernels = pick_quantize_kernels();
  const int64_t tasks = call.pages + 1;  // the last one: the hot tokens, and zeros behind them
  torch::stable::parallel_for(0, call.batch * call.groups * tasks, 1, [&](int64_t begin, int64_t end) {
    const AlignedMemory scratch(kernels.scratch_bytes(call.fmt));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t page = i % tasks, g = i / tasks % call.groups, b = i / tasks / call.groups;
      if (page < call.pages) {
        const KvChannels channels[2] = {call.channels(0, b, g), call.channels(1, b, g)};
        void* const to[2] = {place(0, b, call.first(b, g, page), g), place(1, b, call.first(b, g, page), g)};
        kernels.unseal(call.fmt, call.page(b, g, page), call.data_end(), channels, call.dtype, to, stride,
                       scratch.get());
        continue;
      }
      for (int which = 0; which < 2; ++which) {
        const HeadRows hot = call.hot_rows(which ? call.hot_v : call.hot_k, b, g);
        for (int64_t t = call.sealed(b, g); t < total; ++t) {
          const int64_t of_hot = t - call.sealed(b, g);
          char* const to = place(which, b, t, g);
          const char* const from = static_cast<const char*>(hot.data) + of_hot * hot.stride * hot.element_bytes;
          if (of_hot < hot.count) {
            std::copy(from, from + row_bytes, to);
          } else {
            std::fill(to, to + row_bytes, 0);
          }
        }
      }
    }
  });
  return {outs[0], outs[1]};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) {
  m.impl("kv_seal", TORCH_BOX(&fastok::kv_seal));
  m.impl("kv_unseal", TORCH_BOX(&fastok::kv_unseal));
}
