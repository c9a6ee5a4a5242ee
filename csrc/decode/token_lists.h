// The places that decode attention is restricted to, as the kernels take them: ascending, each once.
#pragma once
#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "common/tensor.h"

namespace fastok {

class TokenLists {
 public:
  TokenLists() = default;
  // tokens int32 or int64 [B,lists,K], in any order; what is no place at all is left out.
  explicit TokenLists(const Tensor& tokens) : lists_(tokens.size(1)), pitch_(tokens.size(2)) {
    const int64_t total = tokens.size(0) * lists_;
    const bool wide = tokens.scalar_type() == ScalarType::Long;
    const Tensor dense = checked_contiguous(tokens, wide ? ScalarType::Long : ScalarType::Int, "tokens");
    places_ = std::make_unique_for_overwrite<int32_t[]>(size_t(total * pitch_));
    counts_.resize(size_t(total));
    torch::stable::parallel_for(0, total, 1 + kGrain / (pitch_ + 1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        counts_[size_t(i)] = wide ? arrange(const_data<int64_t>(dense) + i * pitch_, places_.get() + i * pitch_)
                                  : arrange(const_data<int32_t>(dense) + i * pitch_, places_.get() + i * pitch_);
    });
  }

  bool empty() const { return lists_ == 0; }
  // Those of a list that are below `length`.
  const int32_t* of(int64_t b, int64_t list, int64_t length, int64_t& count) const {
    const int32_t* const first = places_.get() + (b * lists_ + list) * pitch_;
    const int32_t* const last = first + counts_[size_t(b * lists_ + list)];
    const bool beyond = first != last && last[-1] >= length;
    count = (beyond ? std::lower_bound(first, last, int32_t(length)) : last) - first;
    return first;
  }

 private:
  static constexpr int64_t kGrain = 8192;  // places worth handing to another thread

  // Lists as select_tokens makes them, ascending and then -1, in loops of a few instructions; -1: it is none.
  template <class Int>
  int64_t copied(const Int* from, int32_t* to) const {
    int64_t count = pitch_;
    while (count > 0 && from[count - 1] < 0) --count;
    if (count == 0) return 0;
    if (from[0] < 0 || from[count - 1] > std::numeric_limits<int32_t>::max()) return -1;
    uint64_t steps = 0;  // minus 1: below 2^31 all of them, if each is
    for (int64_t i = 1; i < count; ++i) steps |= uint64_t(from[i]) - uint64_t(from[i - 1]) - 1;
    if (steps >> 31) return -1;
    for (int64_t i = 0; i < count; ++i) to[i] = int32_t(from[i]);
    return count;
  }
  template <class Int>
  int64_t arrange(const Int* from, int32_t* to) const {
    if (const int64_t count = copied(from, to); count >= 0) return count;
    int64_t count = 0;
    for (int64_t i = 0; i < pitch_; ++i)
      if (from[i] >= 0 && from[i] <= std::numeric_limits<int32_t>::max()) to[count++] = int32_t(from[i]);
    std::sort(to, to + count);
    return std::unique(to, to + count) - to;
  }

  int64_t lists_ = 0, pitch_ = 0;
  std::unique_ptr<int32_t[]> places_;
  std::vector<int64_t> counts_;
};

}  // namespace fastok
