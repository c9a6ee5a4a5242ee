// Flash attention and the scores of blocks of the attention matrix, over packed keys and values.
#include <utility>

#include "attention/amx_simd.h"
#include "attention/attention.h"
#include "attention/bf16_simd.h"
#include "attention/decode_simd.h"
#include "attention/fp32_simd.h"
#include "attention/pass_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

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
    Tiles::stay_awake();
    Pass<E> pass(head, rows, keys, values, key_begin, key_end, fetching, scratch);
    Tiles::stay_awake();
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

// As add_exponentials, of [Behind::kRows][Behind::kKeys].
template <bool kMultiplies, class Weight, class Behind, int... kRow>
void add_exponentials_in_background(Behind& behind, const float* x, float factor, const float* exponent, float* total,
                                    std::integer_sequence<int, kRow...>) {
  const typename Weights<Weight>::Mode mode;
  Behind own = behind;  // in registers
  const vf f = splat(factor * kLog2E);
  vf sum[2] = {load(total), load(total + kLanes)};
  const auto add = [&]<int kAt>(std::integral_constant<int, kAt>) __attribute__((always_inline)) {
    const vf by = splat(exponent[kAt]);
    sum[0] = sum[0] + Weights<Weight>::exp2(fma(load(x + kAt * Behind::kKeys), f, by));
    sum[1] = sum[1] + Weights<Weight>::exp2(fma(load(x + kAt * Behind::kKeys + kLanes), f, by));
    take_steps<kMultiplies, false, kAt>(own);
  };
  (add(std::integral_constant<int, kRow>()), ...);
  store(total, sum[0]);
  store(total + kLanes, sum[1]);
}

// Whose scores are summed up: rows with exponents, of the keys that are seen by some of them.
template <class E>
struct Summed {
  const AttentionHead& head;
  const void* keys;
  int64_t key_begin, key_end;
  const RowList& rows;
  const Seen seen;
  const Scratch<E> scratch;
  float exponent[E::kRows];  // -inf for a row that sees nothing
  float* total;

  const void* keys_at(int64_t key) const {
    return static_cast<const typename E::Weight*>(keys) + (key - key_begin) * E::padded(head.q.width);
  }
  // Of the keys [begin, end) and those up to the next step; behind the block's last key anything may be summed up.
  void finish(int64_t begin, int64_t end, int64_t first_row, int64_t n_rows, float* x) const {
    if (touches<E>(head) || !seen.by_all(begin, end) || (end < begin + E::kStep && end < key_end))
      for (int64_t i = 0; i < n_rows; ++i)
        finish_logits<E>(head, rows.at(first_row + i), begin, end, E::kStep, x + i * E::kStep);
  }
  void add() const {
    static_assert(E::kStep == 2 * kLanes);
    for (int64_t begin = seen.first; begin < seen.last; begin += E::kStep) {
      const int64_t end = begin + E::kStep < seen.last ? begin + E::kStep : seen.last;
      E::multiply(scratch.rows, round_up(rows.count, E::kTileRows), keys, begin - key_begin, E::kStep, head.q.width,
                  scratch.scores, E::kStep);
      finish(begin, end, 0, rows.count, scratch.scores);
      add_exponentials<typename E::Weight>(scratch.scores, rows.count, factor_left<E>(head), exponent,
                                           total + (begin - key_begin));
    }
  }
  // The same, a few rows at a time, while tiles multiply the next ones.
  template <class Behind>
  void add_in_background() const {
    using Weight = typename E::Weight;
    constexpr int kRows = Behind::kRows;
    constexpr auto all = std::make_integer_sequence<int, kRows>();
    const int64_t width = E::padded(head.q.width);
    float* const scores[2] = {scratch.scores, scratch.scores + kRows * E::kStep};
    int turn = 0;
    Behind behind(nullptr);
    E::multiply(scratch.rows, kRows, keys, seen.first - key_begin, E::kStep, head.q.width, scores[0], E::kStep);
    for (int64_t begin = seen.first; begin < seen.last; begin += E::kStep) {
      const int64_t end = begin + E::kStep < seen.last ? begin + E::kStep : seen.last;
      for (int64_t row = 0; row < rows.count; row += kRows, turn = !turn) {
        float* const to = total + (begin - key_begin);
        const int64_t next_row = row + kRows < rows.count ? row + kRows : 0, next = next_row > 0 ? begin : end;
        finish(begin, end, row, kRows, scores[turn]);
        behind.next_products(static_cast<const Weight*>(scratch.rows) + next_row * width, keys_at(next), scores[!turn]);
        next < seen.last ? add_exponentials_in_background<true, Weight>(behind, scores[turn], factor_left<E>(head),
                                                                        exponent + row, to, all)
                         : add_exponentials_in_background<false, Weight>(behind, scores[turn], factor_left<E>(head),
                                                                         exponent + row, to, all);
      }
    }
  }
};

template <class E>
void sum_scores(const AttentionHead& head, const void* keys, int64_t key_begin, int64_t key_end, const RowList& rows,
                const float* lse, float* total, void* memory) {
  [[maybe_unused]] const Tiles tiles;
  Summed<E> summed = {head,
                      keys,
                      key_begin,
                      key_end,
                      rows,
                      Seen(head, rows, key_begin, key_end, E::kStep),
                      Scratch<E>(memory, head.q.width),
                      {},
                      total};
  if (summed.seen.first >= summed.seen.last) return;
  E::pack_rows(head, rows, summed.scratch.rows);
  for (int64_t i = 0; i < rows.count; ++i) summed.exponent[i] = lse[i] != -kInfinity ? -kLog2E * lse[i] : -kInfinity;
  const auto in_background = [&](auto type) { summed.template add_in_background<typename decltype(type)::Type>(); };
  if (rows.count % E::kRowsTogether > 0 || !with_background<E>(E::padded(head.q.width), in_background)) summed.add();
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
