// Flash attention and the scores of blocks of the attention matrix, over packed keys and values. One block of rows
// meets one block of keys at a time: products, then the softmax on vectors, then the values.
#include "attention/amx_simd.h"
#include "attention/attention.h"
#include "attention/bf16_simd.h"
#include "attention/exp_simd.h"
#include "attention/fp32_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// ---- the softmax on a block of scores -------------------------------------------------------------------------------

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
  for (int64_t j = 0; j < first && j < n; ++j) x[j] = -kInfinity;
  for (int64_t j = last > 0 ? last : 0; j < n; ++j) x[j] = -kInfinity;
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

inline void store_weights(float* p, vf x, vf y) {
  store(p, x);
  store(p + kLanes, y);
}
#if defined(__AVX512BF16__)
// The machine's own rounding makes subnormal numbers 0, which weights may be.
inline void store_weights(bf16* p, vf x, vf y) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(y, x);
  std::memcpy(p, &rounded, sizeof rounded);
}
#endif

// exp(x * factor - shift) of an even number of vectors, stored as weights. Returns the sums by lane.
template <class Weight>
inline __attribute__((always_inline)) vf exponentials(const float* x, int64_t n, float factor, float shift,
                                                      Weight* weights) {
  const vf f = splat(factor * kLog2E), s = splat(-shift * kLog2E);
  vf sum[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t j = 0; j < n; j += 2 * kLanes) {
    const vf a = exp2_of(fma(load(x + j), f, s)), b = exp2_of(fma(load(x + j + kLanes), f, s));
    store_weights(weights + j, a, b);
    sum[0] = sum[0] + a;
    sum[1] = sum[1] + b;
  }
  return sum[0] + sum[1];
}

// The running softmax of a block's rows: all peaks first, so that no row waits for another one's.
template <int kRows>
struct Running {
  static constexpr int kPadded = (kRows + kLanes - 1) / kLanes * kLanes;
  float peak[kPadded], here[kPadded], shift[kPadded], shrink[kPadded];
  float total[kRows][kLanes];

  Running() {
    for (int i = 0; i < kPadded; ++i) peak[i] = here[i] = -kInfinity;
    std::memset(total, 0, sizeof total);
  }
  // From `here`, the peaks of another block of keys, still to be scaled. Returns whether any row's earlier weights must
  // shrink.
  bool advance(int64_t rows, float scale) {
    bool shrinks = false;
    for (int64_t i = 0; i < rows; i += kLanes) {
      const vf before = load(peak + i), after = maximum(load(here + i) * splat(scale), before);
      // A row that has seen nothing yet: its NaN, if any, must show.
      const vf by = select(greater(after, splat(-kInfinity)), after, splat(0.0f));
      const vf factor = exp2_of((before - by) * splat(kLog2E));
      shrinks |= any(either(greater(splat(1.0f), factor), unordered(factor)));
      store(shift + i, by);
      store(shrink + i, factor);
      store(peak + i, after);
    }
    return shrinks;
  }
};

template <class E>
struct Scratch {
  void* rows;
  float* scores;  // [kRows][kKeys]
  float* out;     // [kRows][padded value width]
  static size_t part(size_t bytes) { return (bytes + 63) / 64 * 64; }
  static size_t bytes(int64_t width, int64_t v_width) {
    return part(E::row_bytes(width)) + part(E::kRows * E::kKeys * sizeof(float)) +
           part(size_t(E::kRows * E::padded(v_width)) * sizeof(float));
  }
  Scratch(void* memory, int64_t width) {
    char* at = static_cast<char*>(memory);
    rows = at;
    at += part(E::row_bytes(width));
    scores = reinterpret_cast<float*>(at);
    at += part(E::kRows * E::kKeys * sizeof(float));
    out = reinterpret_cast<float*>(at);
  }
};

template <class E>
void forward(const AttentionHead& head, const void* keys, const void* values, int64_t key_begin, int64_t key_end,
             const RowList& all_rows, void* out, int64_t out_stride, bool wide, float* lse, void* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Scratch<E> scratch(memory, head.q.width);
  // In place of the scores.
  auto* const weights = reinterpret_cast<typename E::Weight*>(scratch.scores);
  const float factor = factor_left<E>(head);
  const bool touched = touches<E>(head);
  const int64_t width = head.q.width, v_width = E::padded(head.v.width);
  for (int64_t done = 0; done < all_rows.count; done += E::kRows) {
    const RowList rows = all_rows.part(done, E::kRows);
    const int64_t n_rows = round_up(rows.count, E::kTileRows);
    E::pack_rows(head, rows, scratch.rows);
    // What some row sees, and what all of them see.
    int64_t first = key_end, last = key_begin, seen_from = key_begin, seen_to = key_end;
    for (int64_t i = 0; i < rows.count; ++i) {
      const int64_t from = head.first_key(rows.at(i)), to = head.last_key(rows.at(i));
      first = from < first ? from : first;
      last = to > last ? to : last;
      seen_from = from > seen_from ? from : seen_from;
      seen_to = to < seen_to ? to : seen_to;
    }
    first = first > key_begin ? key_begin + (first - key_begin) / E::kStep * E::kStep : key_begin;
    last = last < key_end ? last : key_end;
    std::memset(scratch.out, 0, size_t(n_rows * v_width) * sizeof(float));

    // Blocks of keys of one size.
    const int64_t blocks = last > first ? (last - first + E::kKeys - 1) / E::kKeys : 1;
    const int64_t size = round_up((last - first + blocks - 1) / blocks, E::kStep);
    Running<E::kRows> running;
    for (int64_t begin = first; begin < last; begin += size) {
      const int64_t end = begin + size < last ? begin + size : last, n = round_up(end - begin, E::kStep);
      E::multiply(scratch.rows, n_rows, keys, begin - key_begin, n, width, scratch.scores, E::kKeys);
      if (touched || begin < seen_from || end > seen_to || n > end - begin)
        for (int64_t i = 0; i < rows.count; ++i)
          finish_logits<E>(head, rows.at(i), begin, end, n, scratch.scores + i * E::kKeys);
      peaks_of(scratch.scores, E::kKeys, rows.count, n, running.here);
      const bool shrinks = running.advance(rows.count, factor);
      for (int64_t i = 0; i < rows.count; ++i) {
        const vf sum =
            exponentials(scratch.scores + i * E::kKeys, n, factor, running.shift[i], weights + i * E::kWeightPitch);
        store(running.total[i], fma(load(running.total[i]), splat(running.shrink[i]), sum));
      }
      for (int64_t i = 0; i < rows.count && shrinks && begin > first; ++i) {
        float* const o = scratch.out + i * v_width;
        for (int64_t c = 0; c < v_width; c += kLanes) store(o + c, load(o + c) * splat(running.shrink[i]));
      }
      if (v_width > 0) E::add_values(weights, n_rows, values, begin - key_begin, n, v_width, scratch.out);
    }

    for (int64_t i = 0; i < rows.count; ++i) {
      const float total = horizontal_sum(load(running.total[i]));
      lse[done + i] = total == 0 ? -kInfinity : running.peak[i] + __builtin_logf(total);
      if (v_width > 0)
        write_row(scratch.out + i * v_width, total == 0 ? 0.0f : 1.0f / total, head.v.width,
                  wide ? Dtype::f32 : head.dtype, out, (done + i) * out_stride);
    }
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

template <class T>
void dot_products(const float* q, const T* k, int64_t stride, int64_t n_keys, int64_t width, float* out) {
  for (int64_t j = 0; j < n_keys; ++j, k += stride) {
    if (j + kAhead < n_keys)
      for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(k + kAhead * stride + d);
    vf sum = splat(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) sum = fma(load(q + d), load(k + d), sum);
    float total = horizontal_sum(sum);
    for (; d < width; ++d) total += q[d] * widen(k[d]);
    out[j] = total;
  }
}

void few_scores(const AttentionHead& head, int64_t key_begin, int64_t key_end, const RowList& rows, const float* lse,
                float* out, int64_t pitch) {
  const int64_t n = key_end - key_begin, at = key_begin * head.k.stride;
  for (int64_t i = 0; i < rows.count; ++i) {
    float q[256];
    widen_row(head.q, head.dtype, rows.at(i), head.scale, q);
    float* const x = out + i * pitch;
    std::memset(x + n, 0, size_t(pitch - n) * sizeof(float));
    switch (head.dtype) {
      case Dtype::f16:
        dot_products(q, static_cast<const f16*>(head.k.data) + at, head.k.stride, n, head.k.width, x);
        break;
      case Dtype::bf16:
        dot_products(q, static_cast<const bf16*>(head.k.data) + at, head.k.stride, n, head.k.width, x);
        break;
      default:
        dot_products(q, static_cast<const float*>(head.k.data) + at, head.k.stride, n, head.k.width, x);
    }
    finish_logits<Fp32>(head, rows.at(i), key_begin, key_end, pitch, x);
    finish_scores(x, pitch, factor_left<Fp32>(head), lse ? lse + i : nullptr);
  }
}

template <class E>
constexpr AttentionEngine engine_of() {
  return {E::kRows,     E::kStep,       E::key_bytes, E::value_bytes, Scratch<E>::bytes,
          E::pack_keys, E::pack_values, forward<E>,   scores<E>};
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
const AttentionKernels attention_kernels = {few_scores, kFp32,
#if defined(__AVX512BF16__)
                                            &kBf16,
#else
                                            nullptr,
#endif
                                            fold_rows,  fold_blocks, merge_parts};

}  // namespace fastok::FASTOK_ISA
