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
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
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

void largest(const float* x, int64_t n, int64_t m, int32_t* index, uint32_t* scratch) {
  uint32_t *const keys = scratch, *const left = scratch + n;
  int32_t* const found = reinterpret_cast<int32_t*>(scratch + 2 * n);
  const float least = estimate(x, n, m, keys, left);
  int64_t count = collect(x, n, least, found);
  if (count < m) count = collect(x, n, -std::numeric_limits<float>::infinity(), found);
  for (int64_t i = 0; i < count; ++i) keys[i] = key_of(x[found[i]]);
  int64_t ties;
  const uint32_t bound = radix_select(keys, count, m, left, ties);
  for (int64_t i = 0; i < count; ++i) {
    const bool equal = keys[i] == bound, taken = keys[i] > bound || (equal && ties > 0);
    ties -= equal && taken;
    if (taken) *index++ = found[i];
  }
}

}  // namespace

extern const SelectTokensKernels select_tokens_kernels;
const SelectTokensKernels select_tokens_kernels{largest};

}  // namespace fastok::FASTOK_ISA
