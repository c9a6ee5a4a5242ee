// How the engines of attention read and write the rows of one head. See cpu/simd.h for the rule about linkage.
#pragma once
#include "attention/attention.h"
#include "cpu/simd.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
void widen_row(const T* x, int64_t width, float factor, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(x + d) * splat(factor));
  for (; d < width; ++d) out[d] = widen(x[d]) * factor;
}

void widen_row(const HeadRows& rows, Dtype dtype, int64_t row, float factor, float* out) {
  const int64_t at = row * rows.stride;
  switch (dtype) {
    case Dtype::f16:
      return widen_row(static_cast<const f16*>(rows.data) + at, rows.width, factor, out);
    case Dtype::bf16:
      return widen_row(static_cast<const bf16*>(rows.data) + at, rows.width, factor, out);
    default:
      return widen_row(static_cast<const float*>(rows.data) + at, rows.width, factor, out);
  }
}

template <class T>
void write_row(const float* x, float factor, int64_t width, T* out) {
  int64_t c = 0;
  const auto part = [&](int64_t at) { return load(x + at) * splat(factor); };
  for (; c + 2 * kLanes <= width; c += 2 * kLanes) store(out + c, part(c), part(c + kLanes));
  for (; c + kLanes <= width; c += kLanes) store(out + c, part(c));
  for (; c < width; ++c) narrow(x[c] * factor, out[c]);
}

void write_row(const float* x, float factor, int64_t width, Dtype dtype, void* out, int64_t at) {
  switch (dtype) {
    case Dtype::f16:
      return write_row(x, factor, width, static_cast<f16*>(out) + at);
    case Dtype::bf16:
      return write_row(x, factor, width, static_cast<bf16*>(out) + at);
    default:
      return write_row(x, factor, width, static_cast<float*>(out) + at);
  }
}

// Tokens of one head lie a page apart, more than the hardware foresees.
constexpr int64_t kAhead = 12;
inline void prefetch_row(const HeadRows& rows, int64_t row) {
  if (row >= rows.count) return;
  const char* const at = static_cast<const char*>(rows.data) + row * rows.stride * rows.element_bytes;
  for (int64_t byte = 0; byte < rows.width * rows.element_bytes; byte += 64) __builtin_prefetch(at + byte);
}

// Asks for the cache lines of what comes next, at every step for a few: spread over the steps, so that the products
// between them do not wait, and no buffer is full.
class Fetching {
 public:
  Fetching(const Upcoming& upcoming, int64_t steps) : next_(upcoming.part), end_(upcoming.part + Upcoming::kParts) {
    int64_t lines = 0;
    for (const RowsAhead& part : upcoming.part) lines += (part.end - part.begin) * lines_of(part.rows);
    rate_ = steps > 0 ? lines * kOne / steps + 1 : 0;
  }
  inline __attribute__((always_inline)) void step(int64_t steps = 1) {
    for (due_ += steps * rate_; due_ >= kOne; due_ -= kOne) {
      if (line_ == lines_ && !next_row()) return;
      __builtin_prefetch(row_ + kLine * line_++, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64, kOne = 1 << 16;
  static int64_t lines_of(const HeadRows& rows) { return (rows.width * rows.element_bytes + kLine - 1) / kLine; }
  bool next_row() {
    if (rows_left_ > 0) {
      row_ += stride_;
    } else {
      while (next_ < end_ && next_->begin >= next_->end) ++next_;
      if (next_ == end_) return false;
      const HeadRows& rows = next_->rows;
      stride_ = rows.stride * rows.element_bytes;
      row_ = static_cast<const char*>(rows.data) + next_->begin * stride_;
      lines_ = lines_of(rows);
      rows_left_ = next_->end - next_->begin;
      ++next_;
    }
    --rows_left_;
    line_ = 0;
    return true;
  }

  const RowsAhead *next_, *end_;
  const char* row_ = nullptr;
  int64_t stride_ = 0, rows_left_ = 0, line_ = 0, lines_ = 0;
  int64_t rate_, due_ = 0;  // of lines, in parts of one
};

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

}  // namespace
}  // namespace fastok::FASTOK_ISA
