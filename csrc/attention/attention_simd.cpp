// Flash attention and the scores of blocks of the attention matrix, over packed keys and values. One block of rows
// meets one block of keys at a time: products, then the softmax on vectors, then the values.
#include "attention/amx_simd.h"
#include "attention/attention.h"
#include "attention/bf16_simd.h"
#include "attention/decode_simd.h"
#include "attention/fp32_simd.h"
#include "attention/softmax_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

template <class E>
struct Scratch {
  static constexpr int kFewKeys = 64;
  void* rows;
  float* scores;                // [kRows][kKeys], or [kRowsTogether][kFewKeys] and
  typename E::Weight* weights;  // [kRowsTogether][kWeightPitch]
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
        scratch_(scratch) {
    std::memset(scratch.out, 0, size_t(n_rows_ * v_width_) * sizeof(float));
  }

  // Many keys by the peaks that there are, at first those of a few, as long as weights do not become large; else a few
  // by their own. Or, where peaks are not lazy (Weights), block after block by its own.
  void over_keys() {
    const int64_t first = seen_.first, last = seen_.last;
    if constexpr (Weights<Weight>::kLazyPeaks) {
      const int64_t size = even_part(last - first, E::kWeightPitch, kFewKeys);
      for (int64_t begin = first, end; begin < last; begin = end) {
        end = begin + size < last ? begin + size : last;
        if (begin == first) find_peaks(begin, end);
        if (!running_.settled || !weigh_by_old_peaks(begin, end, begin == first)) {
          end = begin + kFewKeys < last ? begin + kFewKeys : last;
          multiply(begin, end, kFewKeys);
          weigh(end - begin, kFewKeys, scratch_.weights);
        }
        add_values(scratch_.weights, begin, end);
      }
    } else {
      auto* const weights = reinterpret_cast<Weight*>(scratch_.scores);  // in their place
      const int64_t size = even_part(last - first, E::kKeys, E::kStep);
      for (int64_t begin = first, end; begin < last; begin = end) {
        end = begin + size < last ? begin + size : last;
        multiply(begin, end, E::kKeys);
        weigh(end - begin, E::kKeys, weights);
        add_values(weights, begin, end);
      }
    }
  }
  void write(bool wide, void* out, int64_t out_stride, int64_t at, float* lse) const {
    float of_rows[E::kRowsTogether], factor[E::kRowsTogether];
    running_.finish(of_rows, factor);
    std::memcpy(lse + at, of_rows, size_t(rows_.count) * sizeof(float));
    for (int64_t i = 0; i < rows_.count && v_width_ > 0; ++i)
      write_row(scratch_.out + i * v_width_, factor[i], head_.v.width, wide ? Dtype::f32 : head_.dtype, out,
                (at + i) * out_stride);
  }
  void foresee_writing(bool wide, void* out, int64_t out_stride, int64_t at) const {
    const int64_t element = wide ? int64_t(sizeof(float)) : head_.q.element_bytes;
    for (int64_t i = 0; i < rows_.count; ++i)
      for (int64_t byte = 0; byte < head_.v.width * element; byte += 64)
        __builtin_prefetch(static_cast<char*>(out) + (at + i) * out_stride * element + byte, 1);
  }

 private:
  using Weight = typename E::Weight;
  static constexpr int kFewKeys = Scratch<E>::kFewKeys;

  // How many of `n` keys to take at a time, in whole steps, when at most `most` are.
  static int64_t even_part(int64_t n, int64_t most, int64_t step) {
    const int64_t parts = n > 0 ? (n + most - 1) / most : 1;
    return n > 0 ? round_up((n + parts - 1) / parts, step) : step;
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
  // The peaks of the first few of these keys, before anything is summed up. Their logits remain in scratch.scores.
  void find_peaks(int64_t begin, int64_t end) {
    const int64_t few_end = begin + kFewKeys < end ? begin + kFewKeys : end;
    multiply(begin, few_end, kFewKeys);
    peaks_of(scratch_.scores, kFewKeys, rows_.count, round_up(few_end - begin, E::kStep), running_.here);
    running_.advance(rows_.count, factor_);
  }
  // Weighs these logits by the highest peaks so far: what was summed up before shrinks.
  void weigh(int64_t n_keys, int64_t pitch, Weight* weights) {
    [[maybe_unused]] const typename Weights<Weight>::Mode mode;
    const int64_t n = round_up(n_keys, E::kStep);
    const float* const x = scratch_.scores;
    peaks_of(x, pitch, rows_.count, n, running_.here);
    const bool shrinks = running_.advance(rows_.count, factor_);
    for (int64_t i = 0; i < rows_.count; ++i, fetching_.step())
      store(running_.sum[i], exponentials(x + i * pitch, n, factor_, running_.shift[i], weights + i * E::kWeightPitch));
    running_.shrink_and_add_sums(rows_.count);
    for (int64_t i = 0; shrinks && i < rows_.count; ++i)
      for (int64_t c = 0; c < v_width_; c += kLanes)
        store(scratch_.out + i * v_width_ + c, load(scratch_.out + i * v_width_ + c) * splat(running_.shrink[i]));
  }
  // Weighs the keys [begin, end) by the peaks that there are, a few at a time, while their logits are in the
  // first-level cache; those of the first few may be there already. Returns false, with nothing added up, if weights
  // would become large.
  bool weigh_by_old_peaks(int64_t begin, int64_t end, bool first_are_there) {
    const int64_t count = rows_.count;
    std::memset(running_.sum, 0, size_t(count) * sizeof(running_.sum[0]));
    float exponent[E::kRowsTogether];
    for (int64_t i = 0; i < count; ++i) exponent[i] = -kLog2E * running_.shift[i];
    for (int64_t j = begin; j < end; j += kFewKeys) {
      const int64_t few_end = j + kFewKeys < end ? j + kFewKeys : end;
      if (j > begin || !first_are_there) multiply(j, few_end, kFewKeys, false);
      if (few_end - j == kFewKeys)
        exponentiate(exponent, scratch_.weights + (j - begin));
      else
        exponentiate_last(exponent, few_end - j, scratch_.weights + (j - begin));
    }
    return running_.add_sums(count);
  }
  // exp of kFewKeys scores of each row, added to the rows' sums.
  void exponentiate(const float* exponent, Weight* weights) {
    constexpr int kVectors = kFewKeys / kLanes;
    const typename Weights<Weight>::Mode mode;
    const vf factor = splat(factor_ * kLog2E);
    for (int64_t i = 0; i < rows_.count; ++i, fetching_.step()) {
      const float* const x = scratch_.scores + i * kFewKeys;
      const vf shift = splat(exponent[i]);
      vf e[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) e[v] = Weights<Weight>::exp2(fma(load(x + v * kLanes), factor, shift));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v += 2)
        Weights<Weight>::keep(weights + i * E::kWeightPitch + v * kLanes, e[v], e[v + 1]);
      store(running_.sum[i], load(running_.sum[i]) + ((e[0] + e[1]) + (e[2] + e[3])));
    }
  }
  // exp of the scores of the last `n` keys, fewer than kFewKeys, and 0 behind them, up to the next step.
  void exponentiate_last(const float* exponent, int64_t n, Weight* weights) {
    const typename Weights<Weight>::Mode mode;
    const vf factor = splat(factor_ * kLog2E), zero = splat(0.0f);
    const vmask of_last = greater(splat(float((n - 1) % kLanes + 1)), load(kLaneNumbers));
    const auto weight = [&](const float* x, int64_t j, vf shift) {
      if (j >= n) return zero;
      const vf e = Weights<Weight>::exp2(fma(load(x + j), factor, shift));
      return j + kLanes > n ? select(of_last, e, zero) : e;
    };
    for (int64_t i = 0; i < rows_.count; ++i) {
      const float* const x = scratch_.scores + i * kFewKeys;
      const vf shift = splat(exponent[i]);
      vf sum = load(running_.sum[i]);
      for (int64_t j = 0; j < round_up(n, E::kStep); j += 2 * kLanes) {
        const vf a = weight(x, j, shift), b = weight(x, j + kLanes, shift);
        Weights<Weight>::keep(weights + i * E::kWeightPitch + j, a, b);
        sum = sum + (a + b);
      }
      store(running_.sum[i], sum);
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
};

template <class E>
void forward(const AttentionHead& head, const void* keys, const void* values, int64_t key_begin, int64_t key_end,
             const RowList& all_rows, const Upcoming& upcoming, void* out, int64_t out_stride, bool wide, float* lse,
             void* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Scratch<E> scratch(memory, head.q.width);
  constexpr int64_t kTogether = Weights<typename E::Weight>::kLazyPeaks ? Scratch<E>::kFewKeys : E::kKeys;
  const Seen seen(head, all_rows, key_begin, key_end, E::kStep);
  Fetching fetching(upcoming, all_rows.count * ((seen.last - seen.first) / kTogether));
  for (int64_t done = 0; done < all_rows.count; done += E::kRowsTogether) {
    const RowList rows = all_rows.part(done, E::kRowsTogether);
    E::pack_rows(head, rows, scratch.rows);
    Pass<E> pass(head, rows, keys, values, key_begin, key_end, fetching, scratch);
    pass.foresee_writing(wide, out, out_stride, done);
    pass.over_keys();
    pass.write(wide, out, out_stride, done, lse);
  }
}

// From logits to what is asked for, in place.
void finish_scores(float* x, int64_t n, float factor, const float* lse) {
  if (!lse) {
    for (int64_t j = 0; j < n && factor != 1.0f; j += kLanes) store(x + j, load(x + j) * splat(factor));
  } else if (*lse == -kInfinity) {
    std::memset(x, 0, size_t(n) * sizeof(float));
  } else {
    exponentials(x, n, factor, *lse, x);
  }
}

template <class E>
void scores(const AttentionHead& head, const void* keys, int64_t key_begin, int64_t key_end, const RowList& rows,
            const float* lse, float* out, int64_t pitch, void* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Scratch<E> scratch(memory, head.q.width);
  const int64_t n = round_up(key_end - key_begin, E::kStep);
  E::pack_rows(head, rows, scratch.rows);
  E::multiply(scratch.rows, round_up(rows.count, E::kTileRows), keys, 0, n, head.q.width, out, pitch);
  for (int64_t i = 0; i < rows.count; ++i) {
    float* const x = out + i * pitch;
    finish_logits<E>(head, rows.at(i), key_begin, key_end, n, x);
    finish_scores(x, n, factor_left<E>(head), lse ? lse + i : nullptr);
  }
}

template <class E>
void sum_scores(const AttentionHead& head, const void* keys, int64_t key_begin, int64_t key_end, const RowList& rows,
                const float* lse, float* total, void* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Scratch<E> scratch(memory, head.q.width);
  const Seen seen(head, rows, key_begin, key_end, E::kStep);
  if (seen.first >= seen.last) return;
  E::pack_rows(head, rows, scratch.rows);
  // Rows that see anything.
  float exponent[E::kRows];
  int64_t row[E::kRows], n_rows = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    row[n_rows] = i;
    exponent[n_rows] = -kLog2E * lse[i];
    n_rows += lse[i] != -kInfinity;
  }
  constexpr int64_t kPart = E::kStep;  // keys at a time: their logits are to be found in the first-level cache
  for (int64_t begin = seen.first; begin < seen.last; begin += kPart) {
    const int64_t end = begin + kPart < seen.last ? begin + kPart : seen.last, n = round_up(end - begin, E::kStep);
    E::multiply(scratch.rows, round_up(rows.count, E::kTileRows), keys, begin - key_begin, n, head.q.width,
                scratch.scores, kPart);
    // Behind the block's last key anything may be summed up.
    if (touches<E>(head) || !seen.by_all(begin, end) || (n > end - begin && end < key_end))
      for (int64_t i = 0; i < n_rows; ++i)
        finish_logits<E>(head, rows.at(row[i]), begin, end, n, scratch.scores + row[i] * kPart);
    add_exponentials<typename E::Weight>(scratch.scores, kPart, row, n_rows, n, factor_left<E>(head), exponent,
                                         total + (begin - key_begin));
  }
}

// out[row][key] of rows q[row], kFewWidth apart, and keys that lie in memory as they are.
constexpr int64_t kFewWidth = 256, kKeysAhead = 16;
template <class T, int kRows>
void dot_products(const float* q, const T* k, int64_t stride, int64_t n_keys, int64_t width, float* out,
                  int64_t pitch) {
  constexpr int kSums = 16, kTogether = kSums / kRows;  // keys, whose sums are combined together
  for (int64_t j = 0; j < n_keys; j += kTogether) {
    const int64_t n = n_keys - j < kTogether ? n_keys - j : kTogether;
    const T* const first = k + j * stride;
    for (int64_t i = 0; i < kTogether && j + kKeysAhead + i < n_keys; ++i)
      for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(first + (kKeysAhead + i) * stride + d);
    vf sum[kSums];
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sum[i] = splat(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      vf of_query[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) of_query[r] = load(q + r * kFewWidth + d);
#pragma GCC unroll 16
      for (int i = 0; i < kTogether; ++i) {
        const vf of_key = load(first + (i < n ? i : 0) * stride + d);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r * kTogether + i] = fma(of_query[r], of_key, sum[r * kTogether + i]);
      }
    }
    float total[kSums];
#if defined(__AVX512F__)
    store(total, horizontal_sum(sum));
#else
    for (int i = 0; i < kSums; ++i) total[i] = horizontal_sum(sum[i]);
#endif
    for (int r = 0; r < kRows; ++r) {
      for (int64_t i = 0; i < n; ++i) {
        float& x = total[r * kTogether + i];
        for (int64_t rest = d; rest < width; ++rest) x += q[r * kFewWidth + rest] * widen(first[i * stride + rest]);
        out[r * pitch + j + i] = x;
      }
    }
  }
}

template <class T>
void few_logits(const float* q, int64_t rows, const HeadRows& k, int64_t begin, int64_t n, float* out, int64_t pitch) {
  const T* const keys = static_cast<const T*>(k.data) + begin * k.stride;
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4)
    dot_products<T, 4>(q + i * kFewWidth, keys, k.stride, n, k.width, out + i * pitch, pitch);
  for (; i + 2 <= rows; i += 2)
    dot_products<T, 2>(q + i * kFewWidth, keys, k.stride, n, k.width, out + i * pitch, pitch);
  if (i < rows) dot_products<T, 1>(q + i * kFewWidth, keys, k.stride, n, k.width, out + i * pitch, pitch);
}

void few_scores(const AttentionHead& head, int64_t key_begin, int64_t key_end, const RowList& rows, const float* lse,
                float* out, int64_t pitch) {
  const int64_t n = key_end - key_begin;
  constexpr int64_t kRows = 4;  // that read the keys together
  for (int64_t first = 0; first < rows.count; first += kRows) {
    const int64_t count = rows.count - first < kRows ? rows.count - first : kRows;
    float q[kRows * kFewWidth];
    for (int64_t i = 0; i < count; ++i)
      widen_row(head.q, head.dtype, rows.at(first + i), head.scale, q + i * kFewWidth);
    float* const to = out + first * pitch;
    switch (head.dtype) {
      case Dtype::f16:
        few_logits<f16>(q, count, head.k, key_begin, n, to, pitch);
        break;
      case Dtype::bf16:
        few_logits<bf16>(q, count, head.k, key_begin, n, to, pitch);
        break;
      default:
        few_logits<float>(q, count, head.k, key_begin, n, to, pitch);
    }
    for (int64_t i = 0; i < count; ++i) {
      float* const x = to + i * pitch;
      std::memset(x + n, 0, size_t(pitch - n) * sizeof(float));
      finish_logits<Fp32>(head, rows.at(first + i), key_begin, key_end, pitch, x);
      finish_scores(x, pitch, factor_left<Fp32>(head), lse ? lse + first + i : nullptr);
    }
  }
}

template <class E>
constexpr AttentionEngine engine_of() {
  return {E::kRows,     E::kStep,       E::key_bytes, E::value_bytes, Scratch<E>::bytes,
          E::pack_keys, E::pack_values, forward<E>,   scores<E>,      sum_scores<E>};
}

// ---- reductions -----------------------------------------------------------------------------------------------------

void fold_rows(const float* block, int64_t rows, int64_t pitch, int64_t keys, bool max, float* total) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    vf sum = load(total + j);
    for (int64_t i = 0; i < rows; ++i) {
      const vf x = load(block + i * pitch + j);
      const vmask counts = either(greater(x, max ? sum : splat(-kInfinity)), unordered(x));
      sum = max ? select(counts, x, sum) : sum + select(counts, x, splat(0.0f));
    }
    store(total + j, sum);
  }
}

void fold_blocks(const float* block, int64_t rows, int64_t pitch, int64_t keys, const float* weight, bool first,
                 bool max, float* total) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < keys; j += kLanes) {
      vf x = load(block + i * pitch + j);
      if (weight) x = select(greater(x, splat(-kInfinity)), x * load(weight + j), x);
      const vf before = load(total + i * pitch + j);
      store(total + i * pitch + j, first ? x
                                   : max ? select(either(greater(x, before), unordered(x)), x, before)
                                         : before + x);
    }
  }
}

void merge_parts(const float* part, int64_t part_stride, const float* part_lse, int64_t lse_stride, int64_t parts,
                 int64_t width, Dtype dtype, void* out, float* lse) {
  float peak = -kInfinity, total = 0;
  for (int64_t s = 0; s < parts; ++s) {
    const float x = part_lse[s * lse_stride];
    peak = x > peak || x != x ? x : peak;
  }
  float sum[256] = {};
  for (int64_t s = 0; s < parts && peak != -kInfinity; ++s) {
    const float weight = __builtin_expf(part_lse[s * lse_stride] - peak);
    total += weight;
    for (int64_t c = 0; c < width; ++c) sum[c] += weight * part[s * part_stride + c];
  }
  *lse = peak == -kInfinity ? peak : peak + __builtin_logf(total);
  write_row(sum, peak == -kInfinity ? 0.0f : 1.0f / total, width, dtype, out, 0);
}

constexpr AttentionEngine kFp32 = engine_of<Fp32>();
#if defined(FASTOK_AMX)
constexpr AttentionEngine kBf16 = engine_of<Bf16>();
#elif defined(__AVX512BF16__)
constexpr AttentionEngine kBf16 = engine_of<Bf16Vectors>();
#endif

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {few_scores, decode,      Decode::kRows, Decode::scratch_bytes(), kFp32,
#if defined(__AVX512BF16__)
                                            &kBf16,
#else
                                            nullptr,
#endif
                                            fold_rows,  fold_blocks, merge_parts};

}  // namespace fastok::FASTOK_ISA
