// The tensors of a packed cache as the CPU ops take them: checks, and one page or one head at a time.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "attention/call_cpu.h"
#include "common/tensor.h"
#include "quantize/quantize.h"

namespace fastok {

inline KvFormat checked_format(const std::vector<int64_t>& ints, int64_t width) {
  KvFormat fmt;
  STD_TORCH_CHECK(KvFormat::of(ints.data(), ints.size(), width, fmt), "fmt is no packed KV format for head dim ",
                  width);
  return fmt;
}

// What the formats' codes need for each head: `channels[B,G,D]`.
class SideChannels {
 public:
  SideChannels(const KvSide& side, const std::optional<Tensor>& channels, int64_t batch, int64_t groups,
               const char* name)
      : side_(side), groups_(groups) {
    if (side.part[0].fourier) basis_ = fourier_basis(side.part[0].channels);
    if (!side.needs_channels()) return;
    STD_TORCH_CHECK(channels.has_value(), name, " must be given for this format");
    channels_ = checked_contiguous(*channels, ScalarType::Half, name);
    STD_TORCH_CHECK(channels_.dim() == 3 && channels_.size(0) == batch && channels_.size(1) == groups &&
                        channels_.size(2) == side.width,
                    name, " must be [B,G,D]");
    if (!side.hard) return;
    orders_.resize(size_t(batch * groups * side.width));
    const f16* const flags = const_data<f16>(channels_);
    for (int64_t head = 0; head < batch * groups; ++head) {
      const f16* const flag = flags + head * side.width;
      int32_t* const order = orders_.data() + head * side.width;
      int64_t n = 0;
      for (const bool hard : {false, true})
        for (int64_t d = 0; d < side.width; ++d)
          if ((flag[d].bits != 0 && (flag[d].bits & 0x8000) == 0) == hard) order[n++] = int32_t(d);
      // As many hard channels as the format has: codes and channels would not belong together otherwise.
      int64_t hard = 0;
      for (int64_t d = 0; d < side.width; ++d) hard += flag[d].bits != 0 && (flag[d].bits & 0x8000) == 0;
      STD_TORCH_CHECK(hard == side.hard, name, " must mark ", side.hard, " channels of each head, got ", hard);
    }
  }

  KvChannels of(int64_t b, int64_t g) const {
    const int64_t at = (b * groups_ + g) * side_.width;
    return {side_.channel_scale ? const_data<f16>(channels_) + at : nullptr, side_.hard ? orders_.data() + at : nullptr,
            basis_};
  }

 private:
  KvSide side_;
  int64_t groups_;
  Tensor channels_;
  std::vector<int32_t> orders_;
  const float* basis_ = nullptr;
};

// A packed cache whose directory fits its data.
class PackedCall {
 public:
  PackedCall(const Tensor& data_in, const Tensor& offset_in, const Tensor& counts_in,
             const std::optional<Tensor>& classes_in, const std::optional<Tensor>& key_channels,
             const std::optional<Tensor>& value_channels, const Tensor& hot_k_in, const Tensor& hot_v_in,
             const Tensor& hot_len_in, const std::vector<int64_t>& ints)
      : hot_k(with_dense_rows(hot_k_in)),
        hot_v(with_dense_rows(hot_v_in)),
        dtype(dtype_of(hot_k_in, "hot_k")),
        data_(checked_contiguous(data_in, ScalarType::Byte, "data")),
        offset_(offset_in),
        counts_(counts_in),
        hot_len_(checked_contiguous(hot_len_in, ScalarType::Int, "hot_len")) {
    STD_TORCH_CHECK(hot_k.dim() == 4 && hot_v.dim() == 4, "hot_k and hot_v must be [B,G,W,D]");
    batch = hot_k.size(0), groups = hot_k.size(1), window = hot_k.size(2), width = hot_k.size(3);
    for (int64_t d = 0; d < 4; ++d) STD_TORCH_CHECK(hot_v.size(d) == hot_k.size(d), "hot_v must be like hot_k");
    STD_TORCH_CHECK(hot_v.scalar_type() == hot_k.scalar_type(), "hot_v must have the dtype of hot_k");
    fmt = checked_format(ints, width);
    STD_TORCH_CHECK(offset_.scalar_type() == ScalarType::Long && offset_.dim() == 3 && offset_.size(0) == batch &&
                        offset_.size(1) == groups,
                    "offset must be int64 [B,G,pages]");
    pages = offset_.size(2);
    STD_TORCH_CHECK(counts_.scalar_type() == ScalarType::Short && counts_.dim() == 4 && counts_.size(0) == batch &&
                        counts_.size(1) == groups && counts_.size(2) == pages && counts_.size(3) == fmt.token_groups,
                    "counts must be int16 [B,G,pages,token groups]");
    if (counts_.stride(3) != 1 && fmt.token_groups > 1) counts_ = torch::stable::contiguous(counts_);
    STD_TORCH_CHECK(classes_in.has_value() == fmt.two_classes, "classes must be given for formats of two classes only");
    if (fmt.two_classes) {
      classes_ = checked_contiguous(*classes_in, ScalarType::Byte, "classes");
      STD_TORCH_CHECK(classes_.dim() == 4 && classes_.size(0) == batch && classes_.size(1) == groups &&
                          classes_.size(2) == pages && classes_.size(3) == (fmt.page + 7) / 8,
                      "classes must be uint8 [B,G,pages,ceil(page/8)]");
    }
    STD_TORCH_CHECK(hot_len_.dim() == 2 && hot_len_.size(0) == batch && hot_len_.size(1) == groups,
                    "hot_len must be [B,G]");
    // The first page of a cache decides what its channels are; before there is one they are not needed.
    if (pages > 0) {
      channels_[0] = std::make_unique<SideChannels>(fmt.key, key_channels, batch, groups, "key_channels");
      channels_[1] = std::make_unique<SideChannels>(fmt.value, value_channels, batch, groups, "value_channels");
    }
    bytes_ = const_data<uint8_t>(data_);
    offsets_ = const_data<int64_t>(offset_);
    tokens_ = const_data<int16_t>(counts_);
    hot_tokens_ = const_data<int32_t>(hot_len_);
    if (fmt.two_classes) bits_ = const_data<uint8_t>(classes_);
    if (!fmt.two_classes && data_.numel() > 0) {
      const std::vector<int16_t> counts(size_t(fmt.token_groups), int16_t(group_tokens()));
      full_ = KvPage::of(fmt, bytes_, counts.data(), nullptr);
    }
    for (int64_t d = 0; d < 3; ++d) {
      offset_strides_[d] = offset_.stride(d);
      counts_strides_[d] = counts_.stride(d);
    }
    check_directory();
  }

  const uint8_t* data_end() const { return bytes_ + data_.numel(); }
  int64_t hot_len(int64_t b, int64_t g) const { return hot_tokens_[b * groups + g]; }
  int64_t sealed(int64_t b, int64_t g) const { return first_.empty() ? 0 : first_[size_t(head_at(b, g) + pages)]; }
  int64_t length(int64_t b, int64_t g) const { return sealed(b, g) + hot_len(b, g); }
  // The place of a page's first entry.
  int64_t first(int64_t b, int64_t g, int64_t page) const { return first_[size_t(head_at(b, g) + page)]; }
  KvPage page(int64_t b, int64_t g, int64_t i) const {
    const int16_t* const counts = counts_of(b, g, i);
    const uint8_t* const record = bytes_ + offset_of(b, g, i);
    const auto whole = [&](int16_t count) { return count == group_tokens(); };
    if (full_.n > 0 && std::all_of(counts, counts + fmt.token_groups, whole)) return full_.moved(record - bytes_);
    return KvPage::of(fmt, record, counts, classes_of(b, g, i));
  }
  KvChannels channels(int which, int64_t b, int64_t g) const {
    return channels_[which] ? channels_[which]->of(b, g) : KvChannels{};
  }
  // The hot tokens of one head.
  HeadRows hot_rows(const Tensor& hot, int64_t b, int64_t g) const {
    const char* const base = static_cast<const char*>(hot.const_data_ptr()) +
                             (b * hot.stride(0) + g * hot.stride(1)) * int64_t(element_size(dtype));
    return {base, hot.stride(2), hot_len(b, g), width, int64_t(element_size(dtype))};
  }

  KvFormat fmt;
  Tensor hot_k, hot_v;
  Dtype dtype;
  int64_t batch, groups, pages, window, width;

 private:
  int64_t group_tokens() const { return fmt.page / fmt.token_groups; }  // at most
  int64_t head_at(int64_t b, int64_t g) const { return (b * groups + g) * (pages + 1); }
  int64_t offset_of(int64_t b, int64_t g, int64_t i) const {
    return offsets_[b * offset_strides_[0] + g * offset_strides_[1] + i * offset_strides_[2]];
  }
  const int16_t* counts_of(int64_t b, int64_t g, int64_t i) const {
    return tokens_ + b * counts_strides_[0] + g * counts_strides_[1] + i * counts_strides_[2];
  }
  const uint8_t* classes_of(int64_t b, int64_t g, int64_t i) const {
    return bits_ ? bits_ + ((b * groups + g) * pages + i) * ((fmt.page + 7) / 8) : nullptr;
  }
  void check_directory() {
    const int64_t most = group_tokens(), bytes = data_.numel();
    first_.resize(size_t(batch * groups * (pages + 1)));
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t g = 0; g < groups; ++g) {
        STD_TORCH_CHECK(hot_len(b, g) >= 0 && hot_len(b, g) <= window, "hot_len must be within [0, ", window, "], got ",
                        hot_len(b, g));
        int64_t place = 0;
        for (int64_t i = 0; i < pages; ++i) {
          first_[size_t(head_at(b, g) + i)] = place;
          const int16_t* const counts = counts_of(b, g, i);
          int64_t n = 0;
          for (int64_t j = 0; j < fmt.token_groups; ++j) {
            STD_TORCH_CHECK(counts[j] >= 0 && counts[j] <= most, "counts must be within [0, ", most, "], got ",
                            int64_t(counts[j]));
            n += counts[j];
          }
          if (n == 0) continue;
          const int64_t at = offset_of(b, g, i);
          STD_TORCH_CHECK(at >= 0 && at % 16 == 0 && at < bytes, "offset must be a multiple of 16 within data; page ",
                          i, " of head ", g, " of sequence ", b, " is at ", at);
          const int64_t end = at + page(b, g, i).size;
          STD_TORCH_CHECK(end <= bytes, "data is too short: page ", i, " of head ", g, " of sequence ", b,
                          " ends at byte ", end, " of ", bytes);
          place += n;
        }
        first_[size_t(head_at(b, g) + pages)] = place;
      }
    }
  }

  Tensor data_, offset_, counts_, classes_, hot_len_;
  // What they hold: asking a tensor is a call into torch.
  const uint8_t *bytes_, *bits_ = nullptr;
  const int64_t* offsets_;
  const int16_t* tokens_;
  const int32_t* hot_tokens_;
  int64_t offset_strides_[3], counts_strides_[3];
  std::unique_ptr<SideChannels> channels_[2];
  std::vector<int64_t> first_;
  // A page of one class with all of its tokens, as most are, at the beginning of the data.
  KvPage full_{};
};

}  // namespace fastok
