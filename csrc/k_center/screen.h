// Approximate cosine distances between the tokens of one sample, with a bound on their error: all of them by one
// symmetric matrix product, or a batch of candidates against all tokens at a time.
#pragma once
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "cpu/scratch.h"
#include "k_center/k_center.h"

namespace fastok {

class Screen {
 public:
  // Tokens that are not `available` are at distance NaN.
  Screen(const CenterKernels& kernels, const TokenRows& rows, const TokenScale* scales, const bool* available,
         int64_t batch)
      : kernels_(kernels),
        engine_(kernels.bf16 && rows.width >= 32 ? *kernels.bf16 : kernels.fp32),
        rows_(rows),
        scales_(scales),
        n_(rows.count),
        n_cols_((n_ + engine_.cols - 1) / engine_.cols),
        pitch_((n_ + 63) / 64 * 64 + 16),
        batch_(batch),
        row_bytes_(engine_.row_panel_bytes(rows.width) / 64 * 64 + 64),
        col_bytes_(engine_.col_panel_bytes(rows.width) / 64 * 64 + 64),
        factor_(pitch_ + engine_.rows, std::numeric_limits<float>::quiet_NaN()),
        cols_(allocate(size_t(n_cols_) * col_bytes_)) {
    for (int64_t j = 0; j < n_; ++j)
      if (available[j]) factor_[j] = float(1 / scales[j].norm);
    std::vector<float> worst(workers(), 0);
    share_out(n_cols_, [&](int64_t worker, int64_t c) {
      worst[worker] = std::max(worst[worker], engine_.pack_cols(rows_, scales_, c * engine_.cols, col_panel(c)));
    });
    // What packing changed on both sides; fp32 sums of products whose absolute values sum to 1 at most, two roundings
    // each; the rounding of norms, cosines and distances.
    const float packing = *std::max_element(worst.begin(), worst.end());
    error_ = 2.02f * packing + float(rows.width + 64) * 0x1p-23f + 2e-6f;
  }

  // How far an approximate distance can be from the exact one.
  float error() const { return error_; }

  // Distances to the nearest other token, by the products of all pairs; these are kept if `keep`.
  std::vector<float> nearest(bool keep) {
    const int64_t panel_rows = engine_.rows, n_panels = (n_ + panel_rows - 1) / panel_rows;
    // Row panels that fit the second-level cache with a column panel, and enough groups of them to share out.
    const int64_t fitting = int64_t((1 << 20) / row_bytes_), sharing = n_panels / (4 * workers());
    const int64_t group = std::clamp<int64_t>(std::min(fitting, sharing), 1, 8);
    if (keep) gram_ = allocate(size_t(n_panels * panel_rows * pitch_) * sizeof(float));
    std::vector<std::vector<float>> found(workers());
    share_out((n_panels + group - 1) / group, [&](int64_t worker, int64_t task) {
      std::vector<float>& nearest = found[worker];
      if (nearest.empty()) nearest.assign(factor_.size(), std::numeric_limits<float>::infinity());
      const int64_t first = task * group, last = std::min(first + group, n_panels);
      const Scratch packed = allocate(size_t(last - first) * row_bytes_);
      alignas(64) float block[64 * 64];
      for (int64_t p = first; p < last; ++p)
        engine_.pack_rows(rows_, scales_, nullptr, n_, p * panel_rows, packed.get() + size_t(p - first) * row_bytes_);
      engine_.begin();
      for (int64_t c = first_stored(first); c < n_cols_; ++c) {
        for (int64_t p = first; p < last && c >= first_stored(p); ++p) {
          const int64_t row = p * panel_rows, col = c * engine_.cols;
          float* const out = keep ? gram() + row * pitch_ + col : block;
          const int64_t pitch = keep ? pitch_ : engine_.cols;
          engine_.multiply(packed.get() + size_t(p - first) * row_bytes_, col_panel(c), rows_.width, out, pitch);
          for (int64_t i = std::max(row, col); i < std::min(row + panel_rows, col + engine_.cols); ++i)
            out[(i - row) * pitch + i - col] = std::numeric_limits<float>::quiet_NaN();
          kernels_.finish_block(out, panel_rows, engine_.cols, pitch, &factor_[row], &factor_[col], &nearest[row],
                                &nearest[col]);
        }
      }
      engine_.end();
    });
    std::vector<float> nearest(n_, std::numeric_limits<float>::infinity());
    for (const std::vector<float>& one : found)
      for (int64_t j = 0; j < n_ && !one.empty(); ++j) nearest[j] = std::min(nearest[j], one[j]);
    return nearest;
  }

  // Distances of a token to all, padded with NaN to a multiple of 64, until the next call. `promise` tells which others
  // are worth scoring with it: those where it is largest.
  const float* row(int64_t i, const float* promise) {
    if (gram_) return gram_row(i);
    if (const int64_t slot = slot_of(i); slot >= 0) return products_.data() + slot * pitch_;
    score_batch(i, promise);
    return products_.data();
  }

 private:
  std::byte* col_panel(int64_t c) const { return cols_.get() + size_t(c) * col_bytes_; }
  float* gram() const { return reinterpret_cast<float*>(gram_.get()); }
  // The first column panel whose products with row panel p are made: the others are those of a lower row panel.
  int64_t first_stored(int64_t p) const { return p * engine_.rows / engine_.cols; }

  const float* gram_row(int64_t i) {
    row_.resize(pitch_, std::numeric_limits<float>::quiet_NaN());
    const int64_t begin = std::min(first_stored(i / engine_.rows) * engine_.cols, n_);
    for (int64_t j = 0; j < begin; ++j) row_[j] = gram()[j * pitch_ + i];
    std::copy(gram() + i * pitch_ + begin, gram() + i * pitch_ + n_, row_.data() + begin);
    return row_.data();
  }

  int64_t slot_of(int64_t i) const {
    const auto at = std::find(scored_.begin(), scored_.end(), int32_t(i));
    return at == scored_.end() ? -1 : at - scored_.begin();
  }

  void score_batch(int64_t i, const float* promise) {
    std::vector<int32_t> order;
    for (int64_t j = 0; j < n_; ++j)
      if (j != i && promise[j] > -std::numeric_limits<float>::infinity()) order.push_back(int32_t(j));
    const int64_t others = std::min<int64_t>(batch_ - 1, int64_t(order.size()));
    const auto before = [&](int32_t a, int32_t b) {
      return promise[a] > promise[b] || (promise[a] == promise[b] && a < b);
    };
    std::nth_element(order.begin(), order.begin() + others, order.end(), before);
    scored_.assign(1, int32_t(i));
    scored_.insert(scored_.end(), order.begin(), order.begin() + others);

    const int64_t count = int64_t(scored_.size()), n_panels = (count + engine_.rows - 1) / engine_.rows;
    if (!packed_) packed_ = allocate(size_t((batch_ + engine_.rows - 1) / engine_.rows) * row_bytes_);
    products_.resize(size_t(n_panels * engine_.rows * pitch_), std::numeric_limits<float>::quiet_NaN());
    share_out(n_panels, [&](int64_t, int64_t p) {
      engine_.pack_rows(rows_, scales_, scored_.data(), count, p * engine_.rows,
                        packed_.get() + size_t(p) * row_bytes_);
    });
    const int64_t group = std::max<int64_t>(1, n_cols_ / (8 * workers()));
    share_out((n_cols_ + group - 1) / group, [&](int64_t, int64_t task) {
      engine_.begin();
      for (int64_t c = task * group; c < std::min((task + 1) * group, n_cols_); ++c) {
        const int64_t col = c * engine_.cols;
        for (int64_t p = 0; p < n_panels; ++p) {
          float* const out = products_.data() + p * engine_.rows * pitch_ + col;
          engine_.multiply(packed_.get() + size_t(p) * row_bytes_, col_panel(c), rows_.width, out, pitch_);
          for (int64_t r = p * engine_.rows; r < std::min(count, (p + 1) * engine_.rows); ++r)
            kernels_.finish_distances(products_.data() + r * pitch_ + col, engine_.cols, factor_[scored_[r]],
                                      &factor_[col]);
        }
      }
      engine_.end();
    });
  }

  const CenterKernels& kernels_;
  const ScreenEngine& engine_;
  const TokenRows& rows_;
  const TokenScale* scales_;
  const int64_t n_, n_cols_, pitch_, batch_;
  const size_t row_bytes_, col_bytes_;
  std::vector<float> factor_;  // 1 / norm, NaN where not available
  const Scratch cols_;
  float error_;

  Scratch gram_;            // [n padded to row panels][pitch], of row panel p the column panels from first_stored(p) on
  std::vector<float> row_;  // one row of it
  std::vector<int32_t> scored_;
  Scratch packed_;
  std::vector<float> products_;  // [scored padded to row panels][pitch]
};

}  // namespace fastok
