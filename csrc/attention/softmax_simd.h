// The softmax on a block of scores: what lies between the two products of attention.
#pragma once
#include "attention/attention.h"
#include "attention/exp_simd.h"
#include "attention/rows_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// Whether finish_logits has more to do than to mask.
template <class E>
inline __attribute__((always_inline)) bool touches(const AttentionHead& head) {
  return head.softcap > 0 || head.bias || !(E::kScaledRows || head.scale > 0);
}

// The factor that finish_logits leaves to whoever takes the exponential.
template <class E>
inline __attribute__((always_inline)) float factor_left(const AttentionHead& head) {
  return E::kScaledRows || touches<E>(head) ? 1.0f : head.scale;
}

constexpr float kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static_assert(kLanes <= 16);

// Logits of one row in place: scale (unless it is in the rows already, or left), softcap, bias, and -inf for the keys
// that the row does not see. x[0] is key `begin` of `n`, in whole vectors.
template <class E>
inline __attribute__((always_inline)) void finish_logits(const AttentionHead& head, int64_t row, int64_t begin,
                                                         int64_t end, int64_t n, float* x) {
  if (touches<E>(head)) {
    const float factor = E::kScaledRows ? 1.0f : head.scale;
    const vf inner = splat(head.softcap > 0 ? factor / head.softcap : factor), cap = splat(head.softcap);
    for (int64_t j = 0; j < n; j += kLanes) {
      vf logits = load(x + j) * inner;
      if (head.softcap > 0) logits = tanh_of(logits) * cap;
      store(x + j, logits);
    }
    for (int64_t j = 0; head.bias && j < end - begin; ++j) x[j] += head.bias[begin + j];
  }
  const int64_t first = head.first_key(row) - begin,
                last = (head.last_key(row) < end ? head.last_key(row) : end) - begin;
  const vf lane = load(kLaneNumbers);
  for (int64_t j = 0; j < first && j < n; j += kLanes)
    store(x + j, select(greater(splat(float(first - j)), lane), splat(-kInfinity), load(x + j)));
  for (int64_t j = last > 0 ? last / kLanes * kLanes : 0; j < n; j += kLanes)
    store(x + j, select(greater(splat(float(last - j)), lane), load(x + j), splat(-kInfinity)));
}

// The largest of an even number of vectors, by lane.
inline __attribute__((always_inline)) vf peak_of(const float* x, int64_t n) {
  vf peak[2] = {splat(-kInfinity), splat(-kInfinity)};
  for (int64_t j = 0; j < n; j += 2 * kLanes) {
    peak[0] = maximum(load(x + j), peak[0]);
    peak[1] = maximum(load(x + j + kLanes), peak[1]);
  }
  return maximum(peak[0], peak[1]);
}

inline bool has_nan(const float* x, int64_t n) {
  vmask found = unordered(load(x));
  for (int64_t j = kLanes; j < n; j += kLanes) found = either(found, unordered(load(x + j)));
  return any(found);
}

// The largest number of each row.
inline void peaks_of(const float* x, int64_t pitch, int64_t rows, int64_t n, float* out) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= rows; i += 16) {
    vf peak[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) peak[r] = peak_of(x + (i + r) * pitch, n);
    store(out + i, horizontal_max(peak));
  }
#endif
  for (; i < rows; ++i) out[i] = horizontal_max(peak_of(x + i * pitch, n));
}

// How the weights of values are made, while a Mode lives, and kept. Dot products of bf16 flush subnormal numbers
// anyway.
template <class Weight>
struct Weights {
  struct Mode {};
  // A row's peak need not be the highest, as weights keep their precision at any size; but above 1 they lose some of
  // fp32's last digits.
  static constexpr bool kLazyPeaks = false;
  static inline __attribute__((always_inline)) vf exp2(vf x) { return exp2_of(x); }
  static inline __attribute__((always_inline)) void keep(float* p, vf x, vf y) {
    store(p, x);
    store(p + kLanes, y);
  }
};
#if defined(__AVX512BF16__)
// store_flushed makes subnormal numbers 0, which weights may be.
template <>
struct Weights<bf16> {
  using Mode = Flushing;
  static constexpr bool kLazyPeaks = true;
  static inline __attribute__((always_inline)) vf exp2(vf x) { return flushed_exp2_of(x); }
  static inline __attribute__((always_inline)) void keep(bf16* p, vf x, vf y) { store_flushed(p, x, y); }
};
#endif

// exp(x * factor - shift) of an even number of vectors, stored as weights, in their mode. Returns the sums by lane.
template <class Weight>
inline __attribute__((always_inline)) vf exponentials(const float* x, int64_t n, float factor, float shift,
                                                      Weight* weights) {
  const vf f = splat(factor * kLog2E), s = splat(-shift * kLog2E);
  vf sum[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t j = 0; j < n; j += 2 * kLanes) {
    const vf a = Weights<Weight>::exp2(fma(load(x + j), f, s));
    const vf b = Weights<Weight>::exp2(fma(load(x + j + kLanes), f, s));
    Weights<Weight>::keep(weights + j, a, b);
    sum[0] = sum[0] + a;
    sum[1] = sum[1] + b;
  }
  return sum[0] + sum[1];
}

// total += 2**(x * factor * log2(e) + exponent) of rows of two vectors, in ascending order.
template <class Weight>
inline __attribute__((always_inline)) void add_exponentials(const float* x, int64_t n_rows, float factor,
                                                            const float* exponent, float* total) {
  [[maybe_unused]] const typename Weights<Weight>::Mode mode;
  const vf f = splat(factor * kLog2E);
  vf sum[2] = {load(total), load(total + kLanes)};
  for (int64_t i = 0; i < n_rows; ++i, x += 2 * kLanes) {
    const vf s = splat(exponent[i]);
    sum[0] = sum[0] + Weights<Weight>::exp2(fma(load(x), f, s));
    sum[1] = sum[1] + Weights<Weight>::exp2(fma(load(x + kLanes), f, s));
  }
  store(total, sum[0]);
  store(total + kLanes, sum[1]);
}

// The keys of [key_begin, key_end) that some of the rows sees, and those that all see.
struct Seen {
  int64_t first, last;  // `first` a multiple of `step` behind key_begin
  int64_t all_first, all_last;

  Seen(const AttentionHead& head, const RowList& rows, int64_t key_begin, int64_t key_end, int64_t step)
      : first(key_end), last(key_begin), all_first(key_begin), all_last(key_end) {
    const int64_t next =
        rows.index || rows.count < 2 ? 1 : rows.count - 1;  // of neighbours only the first and the last
    for (int64_t i = 0; i < rows.count; i += next) {
      const int64_t from = head.first_key(rows.at(i)), to = head.last_key(rows.at(i));
      first = from < first ? from : first;
      last = to > last ? to : last;
      all_first = from > all_first ? from : all_first;
      all_last = to < all_last ? to : all_last;
    }
    first = first > key_begin ? key_begin + (first - key_begin) / step * step : key_begin;
    last = last < key_end ? last : key_end;
  }
  bool by_all(int64_t begin, int64_t end) const { return begin >= all_first && end <= all_last; }
};

// The running softmax of a block's rows: all peaks first, so that no row waits for another one's. Where peaks are lazy
// (Weights), the next keys are weighed by the peak that each row has, as long as that is not far too low.
template <int kRows>
struct Running {
  static_assert(kRows % kLanes == 0);
  // By lane. A weight up to the first is as good as one below 1; one above the second has lost digits.
  static constexpr float kLarge = 1024, kTooLarge = 0x1p32f;
  float peak[kRows], here[kRows], shrink[kRows];
  float shift[kRows], exponent[kRows];  // what the rows' weights are made with, exponent: of 2
  float total[kRows][kLanes];
  bool settled = false;  // whether each row has a peak

  Running() {
    for (int i = 0; i < kRows; ++i) peak[i] = here[i] = -kInfinity;
    for (int i = 0; i < kRows; ++i) store(total[i], splat(0.0f));
  }
  // From `here`, the peaks of another block of keys, still to be scaled. Returns whether any row's earlier weights must
  // shrink.
  bool advance(int64_t rows, float scale) {
    bool shrinks = false;
    settled = true;
    for (int64_t i = 0; i < rows; i += kLanes) {
      const vf before = load(peak + i), after = maximum(load(here + i) * splat(scale), before);
      // A row that has seen nothing yet: its NaN, if any, must show.
      const vf by = select(greater(after, splat(-kInfinity)), after, splat(0.0f));
      const vf factor = exp2_of((before - by) * splat(kLog2E));
      shrinks |= any(either(greater(splat(1.0f), factor), unordered(factor)));
      store(shift + i, by);
      store(exponent + i, by * splat(-kLog2E));
      store(shrink + i, factor);
      store(peak + i, after);
    }
    for (int64_t i = 0; i < rows; ++i) settled &= peak[i] > -kInfinity;
    return shrinks;
  }
  // The largest total of a lane; NaN does not count.
  float largest(int64_t rows) const {
    vf most[2] = {splat(0.0f), splat(0.0f)};
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
      most[0] = maximum(load(total[i]), most[0]);
      most[1] = maximum(load(total[i + 1]), most[1]);
    }
    if (i < rows) most[0] = maximum(load(total[i]), most[0]);
    return horizontal_max(maximum(most[0], most[1]));
  }
  // The log-sum-exp of rows, and what their sums are to be multiplied by.
  void finish(float* lse, float* factor) const {
    for (int64_t i = 0; i < kRows; i += kLanes) {
      float lane[kLanes];
      for (int64_t row = 0; row < kLanes; ++row) lane[row] = horizontal_sum(load(total[i + row]));
      const vf sums = load(lane);
      const vmask some = either(greater(sums, splat(0.0f)), unordered(sums));
      store(lse + i, select(some, load(peak + i) + log_of(sums), splat(-kInfinity)));
      store(factor + i, select(some, splat(1.0f) / sums, splat(0.0f)));
    }
  }
};

}  // namespace
}  // namespace fastok::FASTOK_ISA
