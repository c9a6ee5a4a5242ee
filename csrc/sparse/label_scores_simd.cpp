// Dot products over a few channels, many tokens at a time: labels are channel-major, so that a vector holds one channel
// of consecutive tokens and nothing has to be added up across it. Bound by reading the labels once.
#include "cpu/simd.h"
#include "sparse/label_scores.h"

namespace fastok::FASTOK_ISA {
namespace {

struct int4 {
  uint8_t bits;  // two codes
};

inline vf widened(const float* p, bool) { return load(p); }
inline vf widened(const f16* p, bool) { return load(p); }
inline vf widened(const bf16* p, bool) { return load(p); }
#if defined(__AVX512F__)
inline vf widened(const int8_t* p, bool) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline vf widened(const int4* p, bool high) {
  const vi bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const vi codes = high ? _mm512_srli_epi32(bytes, 4) : _mm512_and_si512(bytes, _mm512_set1_epi32(15));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(8)));
}
#elif defined(__AVX2__)
inline vf widened(const int8_t* p, bool) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline vf widened(const int4* p, bool high) {
  const vi bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const vi codes = high ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)));
}
#else
inline vf widened(const int8_t* p, bool) { return vf{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
inline vf widened(const int4* p, bool high) {
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = float((high ? p[i].bits >> 4 : p[i].bits & 15) - 8);
  return x;
}
#endif

// The largest of `best` and four others; NaN wins, as in torch's amax. Of a NaN and a number `maximum` is the second.
inline vf largest(const vf (&x)[4], vf best) {
  const vmask nan = either(unordered(x[0], x[1]), unordered(x[2], x[3]));
  best = maximum(maximum(maximum(x[0], x[1]), maximum(x[2], x[3])), best);
  return select(nan, splat(std::numeric_limits<float>::quiet_NaN()), best);
}

template <class Code>
inline constexpr bool kPaired = false;
template <>
inline constexpr bool kPaired<int4> = true;

// Bytes of a channel that are fetched before they are read: there are more channels than the hardware foresees well.
constexpr int64_t kAhead = 2048;

// kVectors vectors of tokens' codes, in order, and scores to where they belong. Two vectors of bf16 are the even tokens
// and the odd ones, which is all that the conversion costs.
template <class Code, int kVectors>
inline void widen_all(const Code* row, bool high, vf (&label)[kVectors]) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) label[v] = widened(row + v * kLanes, high);
}
template <class Code>
inline void store_two(vf first, vf second, float* out) {
  store(out, first);
  store(out + kLanes, second);
}
#if defined(__AVX512F__)
inline void widen_all(const bf16* row, bool, vf (&label)[2]) { load_pair(row, label[0], label[1]); }
template <>
inline void store_two<bf16>(vf even, vf odd, float* out) {
  const vi low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  store(out, _mm512_permutex2var_ps(even, low, odd));
  store(out + kLanes, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
}
#endif

// The best score of kVectors vectors of tokens among `queries` rows of `picked`.
template <class Code, int kVectors>
inline __attribute__((always_inline)) void best_of(const LabelScoresCall& call, const Code* codes, const f16* scale,
                                                   const float* picked, int64_t queries, vf (&best)[kVectors]) {
  const int64_t pairs = (call.r + 1) / 2;
  constexpr int kQueries = 4;
  for (int64_t first = 0; first < queries; first += kQueries) {
    const float* query[kQueries];
    for (int i = 0; i < kQueries; ++i) query[i] = picked + (first + i < queries ? first + i : queries - 1) * call.r;
    vf acc[kQueries][kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kQueries; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) acc[i][v] = splat(0.0f);
    for (int64_t c = 0; c < call.r; ++c) {
      const bool high = kPaired<Code> && c >= pairs;
      const Code* row = codes + (high ? c - pairs : c) * call.channel_stride;
      if (first == 0 && !high) __builtin_prefetch(row + kAhead / sizeof(Code));
      vf label[kVectors];
      widen_all(row, high, label);
#pragma GCC unroll 4
      for (int i = 0; i < kQueries; ++i) {
        const vf x = splat(query[i][c]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(label[v], x, acc[i][v]);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const vf factor = scale ? load(scale + v * kLanes) : splat(1.0f);
      best[v] = largest({acc[0][v] * factor, acc[1][v] * factor, acc[2][v] * factor, acc[3][v] * factor}, best[v]);
    }
  }
}

template <class Code>
void score_head(const LabelScoresCall& call, int64_t b, int64_t out_head, const float* picked, int64_t begin,
                int64_t end, float* out) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const int64_t length = call.lengths ? call.lengths[b] : call.tokens;
  const int64_t there = length < begin ? begin : length < end ? length : end;
  for (int64_t t = there; t < end; ++t) out[t] = lowest;
  const int64_t group = call.heads / call.out_heads, sharing = call.heads / call.labels;
  const int64_t together = sharing < group ? sharing : group;  // query heads of the group that have the same labels
  int64_t t = begin;
  if (together == group) {  // nothing but this loop, for nearly all tokens
    const int64_t label = out_head * group / sharing;
    const Code* const codes = static_cast<const Code*>(call.data) + b * call.batch_stride + label * call.head_stride;
    const f16* const scale =
        call.scale ? call.scale + b * call.scale_batch_stride + label * call.scale_head_stride : nullptr;
    const float* const queries = picked + out_head * group * call.rows * call.r;
    for (; t + 2 * kLanes <= there; t += 2 * kLanes) {
      vf best[2] = {splat(lowest), splat(lowest)};
      best_of<Code, 2>(call, codes + t, scale ? scale + t : nullptr, queries, group * call.rows, best);
      store_two<Code>(best[0], best[1], out + t);
    }
  }
  while (t < there) {
    constexpr int kVectors = 2;
    // Less than a vector left: the last one of the range again, or a copy of what there is.
    const int64_t left = there - t;
    const int vectors = left >= kVectors * kLanes ? kVectors : 1;
    const int64_t at = left >= kLanes || there - begin < kLanes ? t : there - kLanes;
    vf best[kVectors];
    for (vf& x : best) x = splat(lowest);
    for (int64_t head = out_head * group; head < (out_head + 1) * group; head += together) {
      const int64_t label = head / sharing;
      const Code* codes = static_cast<const Code*>(call.data) + b * call.batch_stride + label * call.head_stride + at;
      const f16* scale =
          call.scale ? call.scale + b * call.scale_batch_stride + label * call.scale_head_stride + at : nullptr;
      const float* queries = picked + head * call.rows * call.r;
      if (there - at >= kLanes) {
        if (vectors == kVectors) {
          best_of<Code, kVectors>(call, codes, scale, queries, together * call.rows, best);
        } else {
          vf one[1] = {best[0]};
          best_of<Code, 1>(call, codes, scale, queries, together * call.rows, one);
          best[0] = one[0];
        }
      } else {
        // Fewer tokens than lanes in all: into a block of their own, channel after channel.
        constexpr int kMost = 256;
        Code block[kMost * kLanes] = {};
        f16 factors[kLanes] = {};
        LabelScoresCall part = call;
        part.channel_stride = kLanes;
        const int64_t rows = kPaired<Code> ? (call.r + 1) / 2 : call.r;
        for (int64_t c = 0; c < rows; ++c)
          for (int64_t i = 0; i < left; ++i) block[c * kLanes + i] = codes[c * call.channel_stride + i];
        for (int64_t i = 0; scale && i < left; ++i) factors[i] = scale[i];
        vf one[1] = {best[0]};
        best_of<Code, 1>(part, block, scale ? factors : nullptr, queries, together * call.rows, one);
        best[0] = one[0];
      }
    }
    if (there - at >= vectors * kLanes) {
      if (vectors == kVectors) {
        store_two<Code>(best[0], best[1], out + at);
      } else {
        store(out + at, best[0]);
      }
    } else {
      float lanes[kLanes];
      store(lanes, best[0]);
      for (int64_t i = 0; i < left; ++i) out[t + i] = lanes[i];
    }
    t = at + vectors * kLanes;
  }
}

void score(const LabelScoresCall& call, int64_t b, int64_t out_head, const float* picked, int64_t begin, int64_t end,
           float* out) {
  switch (call.code) {
    case LabelCode::f32:
      return score_head<float>(call, b, out_head, picked, begin, end, out);
    case LabelCode::f16:
      return score_head<f16>(call, b, out_head, picked, begin, end, out);
    case LabelCode::bf16:
      return score_head<bf16>(call, b, out_head, picked, begin, end, out);
    case LabelCode::int8:
      return score_head<int8_t>(call, b, out_head, picked, begin, end, out);
    case LabelCode::int4:
      return score_head<int4>(call, b, out_head, picked, begin, end, out);
  }
}

template <class T>
void gather_as(const LabelScoresCall& call, int64_t b, float* picked) {
  const int64_t served = call.heads / call.lists;
  for (int64_t h = 0; h < call.heads; ++h)
    for (int64_t s = 0; s < call.rows; ++s) {
      const T* q =
          static_cast<const T*>(call.q) + b * call.q_batch_stride + s * call.q_row_stride + h * call.q_head_stride;
      const int64_t* list = call.channels + h / served * call.r;
      for (int64_t c = 0; c < call.r; ++c) *picked++ = widen(q[list[c]]);
    }
}

void gather(const LabelScoresCall& call, int64_t b, float* picked) {
  switch (call.q_dtype) {
    case Dtype::f16:
      return gather_as<f16>(call, b, picked);
    case Dtype::bf16:
      return gather_as<bf16>(call, b, picked);
    default:
      return gather_as<float>(call, b, picked);
  }
}

}  // namespace

extern const LabelScoresKernels label_scores_kernels;
const LabelScoresKernels label_scores_kernels{gather, score};

}  // namespace fastok::FASTOK_ISA
