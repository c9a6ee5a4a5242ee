// Exact selection in about one pass: a sample of the scores tells a threshold that probably lets a few more than m
// through, one vector pass collects those, and a radix select among them finds the exact one. Where the sample misled,
// everything is collected instead.
#include "cpu/simd.h"
#include "sparse/select_tokens.h"

namespace fastok::FASTOK_ISA {
namespace {

// Larger scores have larger keys. -0 is 0 and NaN is -inf.
inline uint32_t key_of(float x) {
  const uint32_t bits = bits_of(x != x ? -std::numeric_limits<float>::infinity() : x + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
inline float score_of(uint32_t key) { return float_of(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

// The m-th largest of n keys, and how many of those equal to it are among the m largest. `left` has room for n keys.
uint32_t radix_select(const uint32_t* keys, int64_t n, int64_t m, uint32_t* left, int64_t& ties) {
  uint32_t differing = 0;
  for (int64_t i = 0; i < n; ++i) differing |= keys[i] ^ keys[0];
  // Digits of 8 bits from the highest bit in which the keys differ; keys that share a digit so far stay in `left`.
  uint32_t bound = keys[0];
  for (int top = 32 - __builtin_clz(differing | 1); top > 0 && n > 0; top -= 8) {
    const int shift = top > 8 ? top - 8 : 0;
    const uint32_t mask = (1u << (top - shift)) - 1;
    uint32_t histogram[4][256] = {};  // four, since runs of equal digits would wait for each other
    for (int64_t i = 0; i < n; ++i) ++histogram[i & 3][keys[i] >> shift & mask];
    const auto count = [&](uint32_t d) {
      return histogram[0][d] + histogram[1][d] + histogram[2][d] + histogram[3][d];
    };
    uint32_t digit = mask;
    for (; m > count(digit); --digit) m -= count(digit);
    int64_t kept = 0, i = 0;
#if defined(__AVX512F__)
    for (; i + kLanes <= n; i += kLanes) {
      const vi key = _mm512_loadu_si512(keys + i);
      const vi of_key = _mm512_and_si512(_mm512_srl_epi32(key, _mm_cvtsi32_si128(shift)), splat(int32_t(mask)));
      const vmask same = _mm512_cmpeq_epi32_mask(of_key, splat(int32_t(digit)));
      // Of those before, none is read any more where `left` is `keys`.
      _mm512_storeu_si512(left + kept, _mm512_maskz_compress_epi32(same, key));
      kept += __builtin_popcount(same);
    }
#endif
    for (; i < n; ++i) {
      left[kept] = keys[i];
      kept += (keys[i] >> shift & mask) == digit;
    }
    bound = left[0];
    keys = left;
    n = kept;
  }
  ties = m;
  return bound;
}

#if defined(__AVX512F__)
// The same of a vector.
inline vi keys_of(vf x) {
  const vi bits =
      _mm512_castps_si512(select(unordered(x), splat(-std::numeric_limits<float>::infinity()), x + splat(0.0f)));
  const vi sign = _mm512_srai_epi32(bits, 31);
  return _mm512_xor_si512(bits, _mm512_or_si512(sign, splat(INT32_MIN)));
}
#endif

// Indices of the scores that are not below `least`, into `index`, which has room for a vector more; returns how many.
int64_t collect(const float* x, int64_t n, float least, int32_t* index) {
  int64_t count = 0, i = 0;
#if defined(__AVX512F__)
  const vf bound = splat(least);
  vi position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + kLanes <= n; i += kLanes) {
    const vmask fits = _mm512_cmp_ps_mask(load(x + i), bound, _CMP_NLT_UQ);
    store(index + count, _mm512_maskz_compress_epi32(fits, position));
    count += __builtin_popcount(fits);
    position = add(position, splat(kLanes));
  }
#endif
  for (; i < n; ++i) {
    index[count] = int32_t(i);
    count += !(x[i] < least);
  }
  return count;
}

// A score that a few more than m of the n are not below, if a sample is anything to go by; -inf where none is worth it.
float estimate(const float* x, int64_t n, int64_t m, uint32_t* keys, uint32_t* left) {
  constexpr int64_t kSample = 2048;
  const int64_t step = n / kSample;
  if (step < 4 || m > n / 2) return -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < kSample; ++i) keys[i] = key_of(x[i * step]);
  // The expected rank and four standard deviations.
  const int64_t rank = m * kSample / n;
  int64_t deviation = 1;
  while (deviation * deviation < rank) ++deviation;
  int64_t ties;
  return score_of(radix_select(keys, kSample, rank + 4 * deviation + 8, left, ties));
}

// The keys of the scores at these places.
void keys_at(const float* x, const int32_t* index, int64_t count, uint32_t* keys) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= count; i += kLanes)
    _mm512_storeu_si512(keys + i, keys_of(_mm512_i32gather_ps(load(index + i), x, 4)));
#endif
  for (; i < count; ++i) keys[i] = key_of(x[index[i]]);
}

// Those of `found` whose keys are above a bound, and the first `ties` of those at it.
void take(const uint32_t* keys, const int32_t* found, int64_t count, uint32_t bound, int64_t ties, int32_t* index) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + kLanes <= count; i += kLanes) {
    const vi key = _mm512_loadu_si512(keys + i);
    vmask taken = _mm512_cmpgt_epu32_mask(key, splat(int32_t(bound)));
    const vmask equal = _mm512_cmpeq_epu32_mask(key, splat(int32_t(bound)));
    if (ties > 0 && equal != 0) {
      for (vmask rest = equal; rest != 0 && ties > 0; rest &= vmask(rest - 1), --ties) taken |= vmask(rest & -rest);
    }
    const int n = __builtin_popcount(taken);
    _mm512_mask_storeu_epi32(index, vmask((1u << n) - 1), _mm512_maskz_compress_epi32(taken, load(found + i)));
    index += n;
  }
#endif
  for (; i < count; ++i) {
    const bool equal = keys[i] == bound, taken = keys[i] > bound || (equal && ties > 0);
    ties -= equal && taken;
    if (taken) *index++ = found[i];
  }
}

void largest(const float* x, int64_t n, int64_t m, int32_t* index, uint32_t* scratch) {
  uint32_t *const keys = scratch, *const left = scratch + n;
  int32_t* const found = reinterpret_cast<int32_t*>(scratch + 2 * n);
  const float least = estimate(x, n, m, keys, left);
  int64_t count = collect(x, n, least, found);
  if (count < m) count = collect(x, n, -std::numeric_limits<float>::infinity(), found);
  keys_at(x, found, count, keys);
  int64_t ties;
  const uint32_t bound = radix_select(keys, count, m, left, ties);
  take(keys, found, count, bound, ties, index);
}

}  // namespace

extern const SelectTokensKernels select_tokens_kernels;
const SelectTokensKernels select_tokens_kernels{largest};

}  // namespace fastok::FASTOK_ISA
