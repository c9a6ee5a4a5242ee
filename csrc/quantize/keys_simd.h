// Numbers of 16 bits as integers that are ordered as they are, and 2-bit codes made by comparing these.
// See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "quantize/coder_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// N of them.
template <int N>
struct OfKeys {
  typedef int16_t type __attribute__((vector_size(2 * N)));
};
template <int N>
using Keys = typename OfKeys<N>::type;

constexpr int kKeys = 2 * kLanes;
using vs = Keys<kKeys>;

template <class V>
inline V load_keys(const void* p) {
  V x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store_keys(void* p, vs x) { std::memcpy(p, &x, sizeof x); }

// From a number's bits to its key, and back: where it is negative, all bits but the sign are turned. -0 is below 0.
// The keys of inf and -inf enclose those of all finite numbers, and NaNs lie outside.
inline int16_t key_of(int16_t bits) { return int16_t(bits ^ (bits >> 15 & 0x7fff)); }
inline int32_t key_of(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }
inline vs key_of(vs bits) { return bits ^ (bits >> 15 & 0x7fff); }

template <class T>
inline constexpr int16_t kInfinity = 0;
template <>
inline constexpr int16_t kInfinity<f16> = 0x7c00;
template <>
inline constexpr int16_t kInfinity<bf16> = 0x7f80;

// Of keys[kLanes].
template <class T>
inline vf numbers_of(const int16_t* keys) {
  int16_t bits[kLanes];
  for (int l = 0; l < kLanes; ++l) bits[l] = key_of(keys[l]);
  T x[kLanes];
  std::memcpy(x, bits, sizeof x);
  return load(x);
}

template <int N>
inline int16_t least_of(Keys<N> x) {
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const __m128i sign = _mm_set1_epi16(int16_t(0x8000));  // the instruction is of unsigned numbers
    return int16_t(_mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128((__m128i)x, sign)), 0) ^ 0x8000);
  } else {
    Keys<N / 2> half[2];
    std::memcpy(half, &x, sizeof x);
    return least_of<N / 2>(half[0] < half[1] ? half[0] : half[1]);
  }
#else
  int16_t least = x[0];
  for (int l = 1; l < N; ++l) least = x[l] < least ? x[l] : least;
  return least;
#endif
}

// The numbers of `rows` tokens, [rows][width], as keys. While at it, fetches the first half of what is ahead.
class KeyReader {
 public:
  KeyReader(const KvRows& source, int64_t first, int64_t width, int16_t* keys)
      : x_(static_cast<const int16_t*>(source.data) + first * source.stride),
        ahead_(static_cast<const int16_t*>(source.ahead) + first * source.ahead_stride),
        stride_(source.stride),
        ahead_stride_(source.ahead_stride),
        width_(width),
        keys_(keys + first * width) {}

  vs read(int64_t t, int64_t d) const {
    const vs x = key_of(load_keys<vs>(x_ + t * stride_ + d));
    if (d % 64 == 0) __builtin_prefetch(ahead_ + t * ahead_stride_ + d / 2, 0, 2);
    store_keys(keys_ + t * width_ + d, x);
    return x;
  }

 private:
  const int16_t *x_, *ahead_;
  int64_t stride_, ahead_stride_, width_;
  int16_t* keys_;
};

// The other half, of `rows` rows.
inline void fetch_rest(const KvRows& source, int64_t first, int64_t rows, int64_t width) {
  const int16_t* ahead = static_cast<const int16_t*>(source.ahead) + first * source.ahead_stride;
  for (int64_t t = 0; t < rows; ++t, ahead += source.ahead_stride)
    for (int64_t d = width / 64 * 32; d < width; d += 32) __builtin_prefetch(ahead + d, 0, 2);
}

// Reads kCount vectors of each row, from channel d on: the range of each channel.
template <int kCount>
inline void read_columns(const KeyReader& from, int64_t rows, int64_t d, int16_t* least, int16_t* most) {
  vs low[kCount], high[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) low[i] = high[i] = from.read(0, d + i * kKeys);
  for (int64_t t = 1; t < rows; ++t) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const vs x = from.read(t, d + i * kKeys);
      low[i] = x < low[i] ? x : low[i];
      high[i] = x > high[i] ? x : high[i];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    store_keys(least + d + i * kKeys, low[i]);
    store_keys(most + d + i * kKeys, high[i]);
  }
}
inline void read_columns(const KeyReader& from, int64_t rows, int64_t width, int16_t* least, int16_t* most) {
  int64_t d = 0;
  for (; d + 4 * kKeys <= width; d += 4 * kKeys) read_columns<4>(from, rows, d, least, most);
  for (; d < width; d += kKeys) read_columns<1>(from, rows, d, least, most);
}

// Reads rows: the range of each `group` neighbours.
inline void read_rows(const KeyReader& from, int64_t rows, int64_t width, int64_t group, int16_t* least,
                      int16_t* most) {
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t d = 0; d < width;) {
      const int64_t end = d + group < width ? d + group : width;
      vs low = from.read(t, d), high = low;
      for (d += kKeys; d < end; d += kKeys) {
        const vs x = from.read(t, d);
        low = x < low ? x : low;
        high = x > high ? x : high;
      }
      *least++ = least_of<kKeys>(low);
      *most++ = int16_t(~least_of<kKeys>(~high));
    }
  }
}

// The ends of ranges as numbers, 0 and inf where not all within is finite. Writes up to kLanes - 1 more.
template <class T>
void ends_of(const int16_t* least, const int16_t* most, int64_t count, float* lo, float* hi) {
  for (int64_t i = 0; i < count; i += kLanes) {
    store(lo + i, numbers_of<T>(least + i));
    store(hi + i, numbers_of<T>(most + i));
    for (int64_t l = i; l < i + kLanes; ++l) {
      const bool bad = most[l] >= kInfinity<T> || least[l] <= int16_t(~kInfinity<T>);
      lo[l] = bad ? 0.0f : lo[l] + 0.0f;  // never -0
      hi[l] = bad ? std::numeric_limits<float>::infinity() : hi[l];
    }
  }
}

// The largest key whose number's difference from lo, rounded to fp32, is not above `bound`; without one, all keys.
template <class T>
int16_t last_below(float lo, float bound) {
  if (!(bound <= kMost)) return std::numeric_limits<int16_t>::max();
  int32_t below = ~kInfinity<T>, above = kInfinity<T>;  // and all between is finite
  while (above - below > 1) {
    const int32_t middle = below + (above - below) / 2;
    T x;
    const int16_t bits = key_of(int16_t(middle));
    std::memcpy(&x, &bits, sizeof x);
    (widen(x) - lo > bound ? above : below) = middle;
  }
  return int16_t(below);
}

// The same for `count` groups: keys above last[i] are those whose x - lo[i] is above bound[i]. Reads and writes up to
// kLanes - 1 more.
template <class T>
void last_below(const float* lo, const float* bound, int64_t count, int16_t* last) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const vf low = load(lo + i), limit = load(bound + i), sum = low + limit;
    T nearest[kLanes];
    float number[kLanes], exact[kLanes];
    int16_t key[kLanes], beyond[kLanes];
    store(nearest, sum);
    store(number, load(nearest));
    store(exact, sum);
    std::memcpy(key, nearest, sizeof key);
    for (int l = 0; l < kLanes; ++l) {
      key[l] = int16_t(key_of(key[l]) - (number[l] > exact[l]));
      beyond[l] = int16_t(key[l] + 1);
    }
    std::memcpy(last + i, key, sizeof key);
    // Almost always the sum is close enough; where it all but vanishes, or there is no step, it is not.
    const vf one = splat(1.0f), here = numbers_of<T>(key) - low, next = numbers_of<T>(beyond) - low;
    const vf wrong = select(greater(next, limit), select(greater(here, limit), one, one - one), one);
    if (!any(greater(wrong, one - one))) continue;
    float is_wrong[kLanes];
    store(is_wrong, wrong);
    for (int64_t l = 0; l < kLanes && i + l < count; ++l)
      if (is_wrong[l] > 0) last[i + l] = last_below<T>(lo[i + l], bound[i + l]);
  }
}

// sum, and `weight` more where x is above a limit.
template <class V>
inline V add_above(V sum, V x, V limit, int16_t weight) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(V) == 64) {
    const __mmask32 above = _mm512_cmpgt_epi16_mask((__m512i)x, (__m512i)limit);
    return (V)_mm512_mask_add_epi16((__m512i)sum, above, (__m512i)sum, _mm512_set1_epi16(weight));
  }
#endif
  return sum + ((x > limit) & weight);
}

// 2-bit codes as they lie in the record: how many of three limits a key is above. `limit(plane, k)`: the k-th of these
// channels in that quarter of the row. `keys` is where those of the first quarter begin.
template <class V, class LimitOf>
inline __attribute__((always_inline)) void code_keys(const int16_t* keys, int64_t quarter, const LimitOf& limit,
                                                     uint8_t* out) {
  V sum{};
#pragma GCC unroll 4
  for (int plane = 0; plane < 4; ++plane) {
    const V x = load_keys<V>(keys + plane * quarter);
#pragma GCC unroll 3
    for (int k = 0; k < 3; ++k) sum = add_above<V>(sum, x, limit(plane, k), int16_t(1 << 2 * plane));
  }
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(V) / 2)));
  const Bytes codes = __builtin_convertvector(sum, Bytes);
  std::memcpy(out, &codes, sizeof codes);
}

// Of keys[rows][width], whose channels have the limits last[k][channel].
template <class V>
void code_columns(const int16_t* keys, int64_t rows, int64_t width, const int16_t* const last[3], uint8_t* out) {
  const int64_t quarter = width / 4;
  for (int64_t i = 0; i < quarter; i += int64_t(sizeof(V) / 2)) {
    V limits[4][3];
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane)
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) limits[plane][k] = load_keys<V>(last[k] + plane * quarter + i);
    for (int64_t t = 0; t < rows; ++t)
      code_keys<V>(
          keys + t * width + i, quarter, [&](int plane, int k) { return limits[plane][k]; }, out + t * quarter + i);
  }
}

// Of keys[rows][width], where each `group` channels of a row have the next of the limits last[k].
template <class V>
void code_rows(const int16_t* keys, int64_t rows, int64_t width, int64_t group, const int16_t* const last[3],
               uint8_t* out) {
  const int64_t quarter = width / 4, per_row = (width + group - 1) / group;
  for (int64_t i = 0; i < quarter; i += int64_t(sizeof(V) / 2)) {
    int64_t of[4];
    for (int plane = 0; plane < 4; ++plane) of[plane] = (plane * quarter + i) / group;
    for (int64_t t = 0; t < rows; ++t)
      code_keys<V>(
          keys + t * width + i, quarter, [&](int plane, int k) { return V{} + last[k][t * per_row + of[plane]]; },
          out + t * quarter + i);
  }
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
