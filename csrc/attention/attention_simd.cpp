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
  const int64_t out_element = wide ? int64_t(sizeof(float)) : head.q.element_bytes;
  const int64_t out_pitch = out_stride * out_element, out_bytes = head.v.width * out_element;
  const int64_t together = E::rows_together(v_width);
  for (int64_t done = 0; done < all_rows.count; done += together) {
    const RowList rows = all_rows.part(done, together);
    const int64_t n_rows = round_up(rows.count, E::kTileRows);
    E::pack_rows(head, rows, scratch.rows);
    const Seen seen(head, rows, key_begin, key_end, E::kStep);
    const int64_t first = seen.first, last = seen.last;
    std::memset(scratch.out, 0, size_t(n_rows * v_width) * sizeof(float));

    // Blocks of keys of one size.
    const int64_t blocks = last > first ? (last - first + E::kKeys - 1) / E::kKeys : 1;
    const int64_t size = round_up((last - first + blocks - 1) / blocks, E::kStep);
    Running<E::kRows> running;
    for (int64_t begin = first; begin < last; begin += size) {
      const int64_t end = begin + size < last ? begin + size : last, n = round_up(end - begin, E::kStep);
      const auto make_logits = [&] {
        E::multiply(scratch.rows, n_rows, keys, begin - key_begin, n, width, scratch.scores, E::kKeys);
        if (touched || !seen.by_all(begin, end) || n > end - begin)
          for (int64_t i = 0; i < rows.count; ++i)
            finish_logits<E>(head, rows.at(i), begin, end, n, scratch.scores + i * E::kKeys);
      };
      const auto weigh = [&] {
        [[maybe_unused]] const typename Weights<typename E::Weight>::Mode mode;
        for (int64_t i = 0; i < rows.count; ++i) {
          store(running.sum[i], exponentials(scratch.scores + i * E::kKeys, n, factor, running.shift[i],
                                             weights + i * E::kWeightPitch));
          for (int64_t byte = 0; byte < out_bytes && begin == first; byte += 64)
            __builtin_prefetch(static_cast<char*>(out) + (done + i) * out_pitch + byte, 1);
        }
      };
      make_logits();
      bool weighed = false;
      if (Weights<typename E::Weight>::kLazyPeaks && running.settled) {
        weigh();
        weighed = running.add_sums(rows.count);
        if (!weighed) make_logits();
      }
      if (!weighed) {
        peaks_of(scratch.scores, E::kKeys, rows.count, n, running.here);
        const bool shrinks = running.advance(rows.count, factor);
        weigh();
        running.shrink_and_add_sums(rows.count);
        for (int64_t i = 0; i < rows.count && shrinks && begin > first; ++i) {
          float* const o = scratch.out + i * v_width;
          for (int64_t c = 0; c < v_width; c += kLanes) store(o + c, load(o + c) * splat(running.shrink[i]));
        }
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

template <class E>
void sum_scores(const AttentionHead& head, const void* keys, int64_t key_begin, int64_t key_end, const RowList& rows,
                const float* lse, float* total, void* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Scratch<E> scratch(memory, head.q.width);
  const Seen seen(head, rows, key_begin, key_end, E::kStep);
  if (seen.first >= seen.last) return;
  E::pack_rows(head, rows, scratch.rows);
  // Rows that see anything.
  float shift[E::kRows];
  int64_t row[E::kRows], n_rows = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    row[n_rows] = i;
    shift[n_rows] = lse[i];
    n_rows += lse[i] != -kInfinity;
  }
  constexpr int64_t kPart = 128;  // keys at a time, for the first-level cache
  static_assert(kPart <= E::kKeys && kPart % E::kStep == 0);
  for (int64_t begin = seen.first; begin < seen.last; begin += kPart) {
    const int64_t end = begin + kPart < seen.last ? begin + kPart : seen.last, n = round_up(end - begin, E::kStep);
    E::multiply(scratch.rows, round_up(rows.count, E::kTileRows), keys, begin - key_begin, n, head.q.width,
                scratch.scores, kPart);
    if (touches<E>(head) || !seen.by_all(begin, end) || n > end - begin)
      for (int64_t i = 0; i < n_rows; ++i)
        finish_logits<E>(head, rows.at(row[i]), begin, end, n, scratch.scores + row[i] * kPart);
    add_exponentials<typename E::Weight>(scratch.scores, kPart, row, n_rows, n, factor_left<E>(head), shift,
                                         total + (begin - key_begin));
  }
}

template <class T>
void dot_products(const float* q, const T* k, int64_t stride, int64_t n_keys, int64_t width, float* out) {
  constexpr int kTogether = 16;  // keys, whose sums are combined together
  for (int64_t j = 0; j < n_keys; j += kTogether) {
    const int64_t n = n_keys - j < kTogether ? n_keys - j : kTogether;
    const T* const first = k + j * stride;
    for (int64_t i = 0; i < kTogether && j + kTogether + i < n_keys; ++i)
      for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T)))
        __builtin_prefetch(first + (kTogether + i) * stride + d);
    vf sum[kTogether];
#pragma GCC unroll 16
    for (int i = 0; i < kTogether; ++i) sum[i] = splat(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) {
      const vf of_query = load(q + d);
#pragma GCC unroll 16
      for (int i = 0; i < kTogether; ++i) sum[i] = fma(of_query, load(first + (i < n ? i : 0) * stride + d), sum[i]);
    }
    float total[kTogether];
#if defined(__AVX512F__)
    store(total, horizontal_sum(sum));
#else
    for (int i = 0; i < kTogether; ++i) total[i] = horizontal_sum(sum[i]);
#endif
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t rest = d; rest < width; ++rest) total[i] += q[rest] * widen(first[i * stride + rest]);
      out[j + i] = total[i];
    }
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
