// CPU backend of max_coverage: lazy greedy selection. The arithmetic is in max_coverage_simd.cpp.
#include <cmath>
#include <limits>
#include <queue>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "cpu/exact_cosines.h"
#include "max_coverage/max_coverage.h"

namespace fastok {
namespace {

// One sample's similarities, a column at a time: of a matrix all are copied, of a pair as many kept as fit.
class Columns {
 public:
  Columns(const CoverageKernels& kernels, const SimilarityRows& matrix)
      : kernels_(kernels), matrix_(matrix), rows_(matrix.rows), n_(matrix.n), kept_(matrix.n) {
    prepare();
  }
  Columns(const CoverageKernels& kernels, const TokenRows& y, const TokenRows& x)
      : kernels_(kernels),
        y_(y),
        x_(x),
        rows_(y.count),
        n_(x.count),
        kept_(plan_kept_columns(y.count, x.count)),
        y_scales_(y.count),
        x_scales_(x.count) {
    const int64_t grain = 1 + (1 << 16) / (x.width + 1);
    for (auto [tokens, scales] : {std::pair(&y_, &y_scales_), std::pair(&x_, &x_scales_)})
      torch::stable::parallel_for(0, tokens->count, grain, [&](int64_t begin, int64_t end) {
        kernels_.measure(*tokens, begin, end, scales->data());
      });
    prepare();
    const ExactTiles* const tiles = exact_tiles_for(x.width);
    filled_ = tiles && all_kept() && rows_ > 0 &&
              exact_cosines(*tiles, x, x_scales_.data(), y, y_scales_.data(), memory_.data(), rows_);
  }

  int64_t rows() const { return rows_; }
  int64_t size() const { return n_; }

  // Calls body(j, column) for every token, by all threads.
  template <class Body>
  void for_each(const Body& body) {
    // Blocks of columns large enough that a pair's rows are read from memory a few times only.
    const int64_t block = std::clamp<int64_t>(n_ / (4 * workers()) / kCenters * kCenters, kCenters, 64);
    share_out((n_ + block - 1) / block, [&](int64_t, int64_t task) {
      const int64_t begin = task * block, end = std::min(begin + block, n_);
      std::vector<float> passing(all_kept() ? 0 : (end - begin) * rows_);
      float* const out = all_kept() ? memory_.data() + begin * rows_ : passing.data();
      if (!filled_) compute(begin, end, out);
      for (int64_t j = begin; j < end; ++j) body(j, out + (j - begin) * rows_);
    });
    filled_ = all_kept();
  }
  // Until the next call, if not all are kept.
  const float* column(int64_t j) {
    if (all_kept()) return memory_.data() + j * rows_;
    if (slot_[j] < 0) {
      const int64_t slot = next_++ % kept_;
      if (holds_[slot] >= 0) slot_[holds_[slot]] = -1;
      holds_[slot] = j, slot_[j] = slot;
      compute(j, j + 1, memory_.data() + slot * rows_);
    }
    return memory_.data() + slot_[j] * rows_;
  }

 private:
  void prepare() {
    memory_.resize(size_t(kept_ * rows_));
    if (all_kept()) return;
    slot_.assign(n_, -1);
    holds_.assign(kept_, -1);
  }
  bool all_kept() const { return kept_ == n_; }
  void compute(int64_t begin, int64_t end, float* out) const {
    if (rows_ == 0) return;
    if (matrix_.data) return kernels_.gather(matrix_, begin, end, out);
    std::vector<double> centers(size_t(kCenters * ((x_.width + 31) / 32 * 32)));
    kernels_.cosines(y_, y_scales_.data(), x_, x_scales_.data(), begin, end, centers.data(), out);
  }

  const CoverageKernels& kernels_;
  const SimilarityRows matrix_{};
  const TokenRows y_{}, x_{};
  const int64_t rows_, n_, kept_;
  std::vector<TokenScale> y_scales_, x_scales_;
  bool filled_ = false;
  std::vector<float> memory_;          // [kept][rows]
  std::vector<int64_t> slot_, holds_;  // of each token its place in memory, and back
  int64_t next_ = 0;
};

// A token's gain when `picks` were picked: at least what it is now.
struct Bound {
  double gain;
  int64_t token, picks;

  // The priority queue has the largest on top: by gain, then the lowest index.
  bool operator<(const Bound& other) const { return gain < other.gain || (gain == other.gain && token > other.token); }
};

void pick_covering(const CoverageKernels& kernels, Columns& columns, int64_t k, const float* modular, int64_t* index,
                   float* gain) {
  const int64_t rows = columns.rows(), n = columns.size();
  std::vector<float> peaks(n);
  columns.for_each([&](int64_t j, const float* column) { peaks[j] = kernels.peak(column, rows); });
  int peak_exponent = 0;
  if (n > 0) std::frexp(*std::max_element(peaks.begin(), peaks.end()), &peak_exponent);
  const int exponent = coverage_exponent(rows, peak_exponent);
  const double unit = std::ldexp(1.0, exponent), size = std::ldexp(1.0, -exponent);

  std::vector<double> covered(rows + 16, 0.0);
  const auto total = [&](int64_t j, const float* column) {
    const double gained = kernels.gain(column, covered.data(), unit, rows) * size;
    if (!modular) return gained;
    constexpr float kLeast = -std::numeric_limits<float>::infinity();
    return modular[j] == kLeast && gained == gained ? double(kLeast) : gained + double(modular[j]);
  };
  std::vector<double> first(n);
  columns.for_each([&](int64_t j, const float* column) { first[j] = total(j, column); });
  std::vector<Bound> bounds;
  std::vector<int64_t> last;  // gains that are NaN stay so
  for (int64_t j = 0; j < n; ++j) {
    if (first[j] == first[j]) {
      bounds.push_back({first[j], j, 0});
    } else {
      last.push_back(j);
    }
  }
  std::priority_queue<Bound> queue(std::less<Bound>(), std::move(bounds));

  for (int64_t step = 0; step < k; ++step) {
    if (queue.empty()) {
      index[step] = last[step - (n - int64_t(last.size()))];
      gain[step] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    // The largest bound, as soon as it is up to date: the others have at most theirs.
    Bound best = queue.top();
    for (; best.picks < step; best = queue.top()) {
      queue.pop();
      queue.push({total(best.token, columns.column(best.token)), best.token, step});
    }
    queue.pop();
    index[step] = best.token;
    gain[step] = float(best.gain);
    kernels.cover(columns.column(best.token), covered.data(), unit, rows);
  }
}

std::tuple<Tensor, Tensor> max_coverage(std::optional<Tensor> similarity, std::optional<Tensor> y,
                                        std::optional<Tensor> x, int64_t k, std::optional<Tensor> modular) {
  STD_TORCH_CHECK(similarity.has_value() != (y.has_value() && x.has_value()), "give similarity, or y and x");
  const Tensor like = similarity ? *similarity : *x;
  STD_TORCH_CHECK(like.dim() == 3, "similarity must be [B,R,N], x [B,N,D]");
  const Dtype dtype = dtype_of(like, "similarity");
  const int64_t batch = like.size(0), n = like.size(similarity ? 2 : 1);
  STD_TORCH_CHECK(k >= 0 && k <= n, "k must be within [0, N=", n, "], got ", k);
  Tensor rows, tokens, added;
  if (!similarity) {
    STD_TORCH_CHECK(y->dim() == 3 && y->size(0) == batch && y->size(2) == x->size(2), "y must be [B,R,D]");
    STD_TORCH_CHECK(y->scalar_type() == x->scalar_type(), "y and x must have the same dtype");
    rows = with_dense_rows(*y);
    tokens = with_dense_rows(*x);
  }
  if (modular) {
    added = checked_contiguous(*modular, ScalarType::Float, "modular");
    STD_TORCH_CHECK(added.numel() == batch * n, "modular must be [B,N]");
  }
  const Tensor index = empty_like_device(like, {batch, k}, ScalarType::Long);
  const Tensor gain = empty_like_device(like, {batch, k}, ScalarType::Float);
  if (batch * k == 0) return {index, gain};

  const CoverageKernels& kernels = pick_max_coverage_kernels();
  const auto sample = [&](const Tensor& t, int64_t b) {
    return static_cast<const char*>(t.const_data_ptr()) + b * t.stride(0) * int64_t(element_size(dtype));
  };
  const auto one = [&](int64_t b) {
    const float* const extra = modular ? const_data<float>(added) + b * n : nullptr;
    Columns columns = similarity
                          ? Columns(kernels, {sample(like, b), dtype, like.stride(1), like.stride(2), like.size(1), n})
                          : Columns(kernels, {sample(rows, b), dtype, rows.stride(1), rows.size(1), rows.size(2)},
                                    {sample(tokens, b), dtype, tokens.stride(1), n, tokens.size(2)});
    pick_covering(kernels, columns, k, extra, data<int64_t>(index) + b * k, data<float>(gain) + b * k);
  };
  if (batch >= workers()) {
    share_out(batch, [&](int64_t, int64_t b) { one(b); });
  } else {
    for (int64_t b = 0; b < batch; ++b) one(b);
  }
  return {index, gain};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("max_coverage", TORCH_BOX(&fastok::max_coverage)); }
