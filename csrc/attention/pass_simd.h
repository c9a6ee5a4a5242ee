// Rows that pass over the keys of one head: products, the softmax on vectors, and the values, block after block.
#pragma once
#include <utility>

#include "attention/softmax_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

template <class E>
struct Scratch {
  static constexpr int kFewKeys = 64;
  void* rows;
  float* scores;                // [kRows][kKeys], or [kRowsTogether][kFewKeys] and
  typename E::Weight* weights;  // [kRowsTogether][kWeightPitch]; with a Background both are halves, taken in turn
  float* out;                   // [kRowsTogether][padded value width]
  static size_t part(size_t bytes) { return (bytes + 63) / 64 * 64; }
  static constexpr size_t kFewBytes = size_t(E::kRowsTogether * kFewKeys) * sizeof(float);
  static constexpr size_t kWeightBytes = size_t(E::kRowsTogether * E::kWeightPitch) * sizeof(typename E::Weight);
  static constexpr size_t kAllBytes = size_t(E::kRows * E::kKeys) * sizeof(float);
  static constexpr size_t kScoreBytes = kAllBytes > kFewBytes + kWeightBytes ? kAllBytes : kFewBytes + kWeightBytes;
  static size_t bytes(int64_t width, int64_t v_width) {
    return part(E::row_bytes(width)) + kScoreBytes +
           part(size_t(E::kRowsTogether * E::padded(v_width)) * sizeof(float));
  }
  Scratch(void* memory, int64_t width) {
    char* at = static_cast<char*>(memory);
    rows = at;
    at += part(E::row_bytes(width));
    scores = reinterpret_cast<float*>(at);
    weights = reinterpret_cast<typename E::Weight*>(at + kFewBytes);
    at += kScoreBytes;
    out = reinterpret_cast<float*>(at);
  }
};

// Calls f(Of<Background of this padded width>), if there is one.
template <class T>
struct Of {
  using Type = T;
};
template <class E, class F>
bool with_background([[maybe_unused]] int64_t width, [[maybe_unused]] const F& f) {
  if constexpr (E::kBackground) {
    switch (width / E::kDepth) {
      case 1:
        return f(Of<typename E::template InBackground<1>>()), true;
      case 2:
        return f(Of<typename E::template InBackground<2>>()), true;
      case 3:
        return f(Of<typename E::template InBackground<3>>()), true;
      case 4:
        return f(Of<typename E::template InBackground<4>>()), true;
      case 8:
        return f(Of<typename E::template InBackground<8>>()), true;
    }
  }
  return false;
}

// The background's steps that fall to the kRow-th row of a round.
template <bool kMultiplies, bool kSums, int kFirst, class Behind, int... kAt>
inline __attribute__((always_inline)) void take_steps(Behind& behind, std::integer_sequence<int, kAt...>) {
  (behind.template step<kMultiplies, kSums, kFirst + kAt>(), ...);
}
template <bool kMultiplies, bool kSums, int kRow, class Behind>
inline __attribute__((always_inline)) void take_steps(Behind& behind) {
  constexpr int kRows = Behind::kRows, kFirst = kRow * Behind::kSteps / kRows;
  constexpr int kBehind = (kRow + 1) * Behind::kSteps / kRows;
  take_steps<kMultiplies, kSums, kFirst>(behind, std::make_integer_sequence<int, kBehind - kFirst>());
}

// Rows that pass over the keys together: what their softmax has come to.
template <class E>
class Pass {
 public:
  Pass(const AttentionHead& head, const RowList& rows, const void* keys, const void* values, int64_t key_begin,
       int64_t key_end, Fetching& fetching, const Scratch<E>& scratch)
      : head_(head),
        rows_(rows),
        n_rows_(round_up(rows.count, E::kTileRows)),
        keys_(keys),
        values_(values),
        key_begin_(key_begin),
        seen_(head, rows, key_begin, key_end, E::kStep),
        factor_(factor_left<E>(head)),
        touched_(touches<E>(head)),
        v_width_(E::padded(head.v.width)),
        fetching_(fetching),
        scratch_(scratch) {}

  void over_keys() {
    [[maybe_unused]] const typename Weights<Weight>::Mode mode;
    if constexpr (Weights<Weight>::kLazyPeaks) {
      if (over_keys_lazily()) return;
      running_ = {};
      empty_ = true;
    }
    clear_empty_out();
    // In place of the scores, where there is no room for both.
    constexpr int64_t kPitch = Weights<Weight>::kLazyPeaks ? kFewKeys : E::kKeys;
    auto* const weights = Weights<Weight>::kLazyPeaks ? scratch_.weights : reinterpret_cast<Weight*>(scratch_.scores);
    const int64_t first = seen_.first, last = seen_.last, size = even_part(last - first, kPitch, E::kStep);
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = begin + size < last ? begin + size : last;
      weigh_by_own_peaks(begin, end, kPitch, weights);
    }
  }
  void write(bool wide, void* out, int64_t out_stride, int64_t at, float* lse) const {
    float of_rows[E::kRowsTogether], factor[E::kRowsTogether];
    running_.finish(of_rows, factor);
    std::memcpy(lse + at, of_rows, size_t(rows_.count) * sizeof(float));
    for (int64_t i = 0; i < rows_.count && v_width_ > 0; ++i) {
      if (i % 8 == 0) Tiles::stay_awake();
      write_row(scratch_.out + i * v_width_, factor[i], head_.v.width, wide ? Dtype::f32 : head_.dtype, out,
                (at + i) * out_stride);
    }
  }

 private:
  using Weight = typename E::Weight;
  static constexpr int kFewKeys = Scratch<E>::kFewKeys;

  // Many keys by the peaks that there are, at first those of a few. Returns false if these were far too low: what there
  // is then is of no use.
  bool over_keys_lazily() {
    bool done = false;
    const auto in_background = [&](auto type) { done = over_keys_in_background<typename decltype(type)::Type>(); };
    if (rows_.count == E::kRowsTogether && E::padded(head_.q.width) == v_width_ &&
        with_background<E>(v_width_, in_background))
      return done;
    clear_empty_out();
    const int64_t first = seen_.first, last = seen_.last, size = even_part(last - first, E::kWeightPitch, kFewKeys);
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = begin + size < last ? begin + size : last;
      if (begin == first) {
        const int64_t few_end = begin + kFewKeys < end ? begin + kFewKeys : end;
        multiply(begin, few_end, kFewKeys);
        find_peaks(kFewKeys, round_up(few_end - begin, E::kStep));
      }
      if (running_.settled) {
        weigh_by_old_peaks(begin, end, begin == first);
        add_values(scratch_.weights, begin, end);
        if (!raise_peaks()) return false;
      } else {
        end = begin + kFewKeys < last ? begin + kFewKeys : last;
        weigh_by_own_peaks(begin, end, kFewKeys, scratch_.weights);
      }
    }
    return true;
  }
  // Where weights have become large. Returns false if they are too large.
  bool raise_peaks() {
    using Sums = Running<E::kRowsTogether>;
    const float largest = running_.largest(rows_.count);
    if (largest <= Sums::kLarge) return true;
    if (!(largest <= Sums::kTooLarge)) return false;
    float unused[E::kRowsTogether];
    running_.finish(running_.here, unused);
    for (float& lse : running_.here) lse /= factor_;
    if (!running_.advance(rows_.count, factor_)) return true;
    for (int64_t i = 0; i < rows_.count; ++i)
      store(running_.total[i], load(running_.total[i]) * splat(running_.shrink[i]));
    shrink_out();
    return true;
  }
  // The same with the tiles' work in the background.
  template <class Behind>
  bool over_keys_in_background() {
    static_assert(2 * Behind::kKeys <= kFewKeys && 2 * Behind::kDepth <= E::kWeightPitch);
    const int64_t last = seen_.last, size = even_part(last - seen_.first, Behind::kDepth, E::kStep);
    Behind behind(scratch_.out);
    bool there = false;  // the products of the next rows and keys
    for (int64_t begin = seen_.first, end; begin < last; begin = end) {
      end = begin + size < last ? begin + size : last;
      if (!there) {
        turn_ = 0;
        const int64_t few_end = begin + Behind::kKeys < end ? begin + Behind::kKeys : end;
        multiply(begin, few_end, Behind::kKeys);
        if (begin == seen_.first) find_peaks(Behind::kKeys, Behind::kKeys);
      }
      if (running_.settled) {
        weigh_in_background(behind, begin, end, there);
        there = true;
        if (running_.largest(E::kRowsTogether) <= Running<E::kRowsTogether>::kLarge) continue;
        behind.finish_values();
        if (!raise_peaks()) return false;
      } else {
        clear_empty_out();
        end = begin + kFewKeys < last ? begin + kFewKeys : last;
        weigh_by_own_peaks(begin, end, kFewKeys, scratch_.weights);
      }
    }
    behind.finish_values();
    clear_empty_out();
    return true;
  }
  // As weigh_by_old_peaks, while tiles multiply the next keys and add up the values of those before; in the end all of
  // these are, and those of [begin, end) are the next. `raw`: the first logits are products only.
  template <class Behind>
  void weigh_in_background(Behind& behind, int64_t begin, int64_t end, bool raw) {
    constexpr int kKeys = Behind::kKeys;
    Weight* const weights = scratch_.weights + part_ * E::kRowsTogether * Behind::kDepth;
    for (int64_t j = begin; j < end; j += kKeys, turn_ = !turn_, raw = true) {
      const int64_t few_end = j + kKeys < end ? j + kKeys : end;
      float* const x = scratch_.scores + turn_ * E::kRowsTogether * kKeys;
      Weight* const to = weights + (j - begin) * E::kRowsTogether;
      if (raw && (touched_ || !seen_.by_all(j, few_end)))
        for (int64_t i = 0; i < E::kRowsTogether; ++i)
          finish_logits<E>(head_, rows_.at(i), j, few_end, kKeys, x + i * kKeys);
      if (few_end < seen_.last) {
        behind.next_products(scratch_.rows, static_cast<const Weight*>(keys_) + (few_end - key_begin_) * v_width_,
                             scratch_.scores + !turn_ * E::kRowsTogether * kKeys);
        behind.sums() ? exponentiate_rows<true, true>(behind, x, kKeys, to)
                      : exponentiate_rows<true, false>(behind, x, kKeys, to);
      } else {
        behind.sums() ? exponentiate_rows<false, true>(behind, x, few_end - j, to)
                      : exponentiate_rows<false, false>(behind, x, few_end - j, to);
      }
    }
    behind.finish_values();
    const Weight* const values = static_cast<const Weight*>(values_) + (begin - key_begin_) * v_width_;
    behind.next_values(weights, values, round_up(end - begin, E::kStep), !empty_);
    empty_ = false;
    part_ = !part_;
  }
  // exp of the scores of `n` keys of each row, added to the rows' totals. There are fewer than kKeys only where no keys
  // follow; the weights behind them are 0.
  template <bool kMultiplies, bool kSums, class Behind>
  inline __attribute__((always_inline)) void exponentiate_rows(Behind& behind, const float* x, int64_t n,
                                                               Weight* weights) {
    Behind own = behind;  // in registers
    const auto all = std::make_integer_sequence<int, E::kRowsTogether>();
    exponentiate_rows<kMultiplies, kSums>(own, x, n, splat(factor_ * kLog2E), weights, all);
    behind = own;
  }
  template <bool kMultiplies, bool kSums, class Behind, int... kRow>
  inline __attribute__((always_inline)) void exponentiate_rows(Behind& behind, const float* x, int64_t n, vf factor,
                                                               Weight* weights, std::integer_sequence<int, kRow...>) {
    const vmask wanted[2] = {greater(splat(float(n)), load(kLaneNumbers)),
                             greater(splat(float(n - kLanes)), load(kLaneNumbers))};
    (exponentiate_row<kMultiplies, kSums, kRow>(behind, x, wanted, factor, weights), ...);
  }
  template <bool kMultiplies, bool kSums, int kRow, class Behind>
  inline __attribute__((always_inline)) void exponentiate_row(Behind& behind, const float* x, const vmask* wanted,
                                                              vf factor, Weight* weights) {
    static_assert(Behind::kKeys == 2 * kLanes);
    const vf exponent = splat(running_.exponent[kRow]);
    vf e[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      e[v] = Weights<Weight>::exp2(fma(load(x + kRow * Behind::kKeys + v * kLanes), factor, exponent));
      if (!kMultiplies) e[v] = select(wanted[v], e[v], splat(0.0f));
    }
    Weights<Weight>::keep(weights + kRow * Behind::kKeys, e[0], e[1]);
    store(running_.total[kRow], load(running_.total[kRow]) + (e[0] + e[1]));
    take_steps<kMultiplies, kSums, kRow>(behind);
    constexpr int kSeldom = 8;
    if constexpr (kRow % kSeldom == 0) fetching_.step(kSeldom * Behind::kKeys / kFewKeys);
  }
  // How many of `n` keys to take at a time, in whole steps, when at most `most` are.
  static int64_t even_part(int64_t n, int64_t most, int64_t step) {
    const int64_t parts = n > 0 ? (n + most - 1) / most : 1;
    return n > 0 ? round_up((n + parts - 1) / parts, step) : step;
  }
  void clear_empty_out() {
    if (empty_) std::memset(scratch_.out, 0, size_t(n_rows_ * v_width_) * sizeof(float));
    empty_ = false;
  }
  // The logits of the keys [begin, end), to scratch.scores. What is there of further keys, up to the next step, is
  // hidden only if `hides` says so.
  void multiply(int64_t begin, int64_t end, int64_t pitch, bool hides = true) const {
    const int64_t n = round_up(end - begin, E::kStep);
    float* const x = scratch_.scores;
    E::multiply(scratch_.rows, n_rows_, keys_, begin - key_begin_, n, head_.q.width, x, pitch);
    if (touched_ || !seen_.by_all(begin, end) || (hides && n > end - begin))
      for (int64_t i = 0; i < rows_.count; ++i) finish_logits<E>(head_, rows_.at(i), begin, end, n, x + i * pitch);
  }
  // The peaks of the first few keys, before anything is summed up.
  void find_peaks(int64_t pitch, int64_t n) {
    const float* const x = scratch_.scores;
    peaks_of(x, pitch, rows_.count, n, running_.here);
    for (int64_t i = 0; i < rows_.count; ++i)  // where there is NaN only, any number will do
      if (running_.here[i] == -kInfinity && has_nan(x + i * pitch, n)) running_.here[i] = 0;
    running_.advance(rows_.count, factor_);
  }
  // A few keys by the highest peaks so far: what was summed up before shrinks.
  void weigh_by_own_peaks(int64_t begin, int64_t end, int64_t pitch, Weight* weights) {
    const int64_t n = round_up(end - begin, E::kStep);
    const float* const x = scratch_.scores;
    multiply(begin, end, pitch);
    peaks_of(x, pitch, rows_.count, n, running_.here);
    const bool shrinks = running_.advance(rows_.count, factor_);
    for (int64_t i = 0; i < rows_.count; ++i, fetching_.step()) {
      Weight* const to = weights + i * E::kWeightPitch;
      const vf sum = exponentials(x + i * pitch, n, factor_, running_.shift[i], to);
      store(running_.total[i], fma(load(running_.total[i]), splat(running_.shrink[i]), sum));
    }
    if (shrinks) shrink_out();
    add_values(weights, begin, end);
  }
  void shrink_out() const {
    for (int64_t i = 0; i < rows_.count; ++i) {
      float* const row = scratch_.out + i * v_width_;
      for (int64_t c = 0; c < v_width_; c += kLanes) store(row + c, load(row + c) * splat(running_.shrink[i]));
    }
  }
  // Weighs the keys [begin, end) by the peaks that there are, a few at a time, while their logits are in the
  // first-level cache; those of the first few may be there already.
  void weigh_by_old_peaks(int64_t begin, int64_t end, bool first_are_there) {
    for (int64_t j = begin; j < end; j += kFewKeys) {
      const int64_t few_end = j + kFewKeys < end ? j + kFewKeys : end;
      if (j > begin || !first_are_there) multiply(j, few_end, kFewKeys, false);
      if (few_end - j == kFewKeys)
        exponentiate(scratch_.weights + (j - begin));
      else
        exponentiate_last(few_end - j, scratch_.weights + (j - begin));
    }
  }
  // exp of kFewKeys scores of each row, added to the rows' totals.
  void exponentiate(Weight* weights) {
    constexpr int kVectors = kFewKeys / kLanes;
    const vf factor = splat(factor_ * kLog2E);
    for (int64_t i = 0; i < rows_.count; ++i, fetching_.step()) {
      const float* const x = scratch_.scores + i * kFewKeys;
      const vf shift = splat(running_.exponent[i]);
      vf e[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) e[v] = Weights<Weight>::exp2(fma(load(x + v * kLanes), factor, shift));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v += 2)
        Weights<Weight>::keep(weights + i * E::kWeightPitch + v * kLanes, e[v], e[v + 1]);
      store(running_.total[i], load(running_.total[i]) + ((e[0] + e[1]) + (e[2] + e[3])));
    }
  }
  // exp of the scores of the last `n` keys, fewer than kFewKeys, and 0 behind them, up to the next step.
  void exponentiate_last(int64_t n, Weight* weights) {
    const vf factor = splat(factor_ * kLog2E), zero = splat(0.0f);
    const vmask of_last = greater(splat(float((n - 1) % kLanes + 1)), load(kLaneNumbers));
    const auto weight = [&](const float* x, int64_t j, vf shift) {
      if (j >= n) return zero;
      const vf e = Weights<Weight>::exp2(fma(load(x + j), factor, shift));
      return j + kLanes > n ? select(of_last, e, zero) : e;
    };
    for (int64_t i = 0; i < rows_.count; ++i) {
      const float* const x = scratch_.scores + i * kFewKeys;
      const vf shift = splat(running_.exponent[i]);
      vf sum = load(running_.total[i]);
      for (int64_t j = 0; j < round_up(n, E::kStep); j += 2 * kLanes) {
        const vf a = weight(x, j, shift), b = weight(x, j + kLanes, shift);
        Weights<Weight>::keep(weights + i * E::kWeightPitch + j, a, b);
        sum = sum + (a + b);
      }
      store(running_.total[i], sum);
    }
  }
  void add_values(const Weight* weights, int64_t begin, int64_t end) const {
    if (v_width_ > 0)
      E::add_values(weights, n_rows_, values_, begin - key_begin_, round_up(end - begin, E::kStep), v_width_,
                    scratch_.out);
  }

  const AttentionHead& head_;
  const RowList rows_;
  const int64_t n_rows_;  // in whole tiles
  const void *keys_, *values_;
  const int64_t key_begin_;
  const Seen seen_;
  const float factor_;
  const bool touched_;
  const int64_t v_width_;
  Fetching& fetching_;
  const Scratch<E>& scratch_;
  Running<E::kRowsTogether> running_;
  bool empty_ = true;        // scratch.out
  int turn_ = 0, part_ = 0;  // of the two buffers, in the background: where the next logits are, and weights will be
};

}  // namespace
}  // namespace fastok::FASTOK_ISA
