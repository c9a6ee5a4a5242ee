// From numbers to codes and to the bytes of a row, given the parameters of their groups.
// See cpu/dispatch.h for the rule about linkage.
#pragma once
#include <limits>

#include "quantize/codes_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kMost = std::numeric_limits<float>::max();

// Room for a row's codes, one byte each.
struct RowCodes {
  alignas(64) uint8_t byte[kMostChannels + 64];
};

inline float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffff); }

// What codes are made with: of each group, or of each channel where groups are along channels.
struct Steps {
  float *step, *top;       // what a code counts, and the largest code: 0 where there are none
  float *inverse, *limit;  // 1 / step, and how close to a half its product must come to be divided instead

  void set(int64_t i, float by, float most) {
    step[i] = by;
    top[i] = by > 0 ? most : 0.0f;
    inverse[i] = 1.0f / (by > 0 ? by : 1.0f);
    // The product differs from the quotient by less than this, unless the inverse is no normal number.
    limit[i] = by > 0 && !(by > 0x1p-100f && by < 0x1p100f) ? std::numeric_limits<float>::infinity() : most * 0x1p-20f;
  }
};

// What 2-bit codes are made with: a code is how many of three bounds x - lo is above. They are the largest numbers
// whose quotient by the step does not round to 1, to 2, to 3.
struct Bounds {
  float* bound[3];

  // Reads and writes up to kLanes - 1 more.
  void set(const float* step, int64_t count) {
    // Quotients go to the nearest fp32, half-way to the even one, then to the nearest integer likewise: what becomes
    // 0.5 or 2.5 still counts as below, what becomes 1.5 no longer. In fp64 these products are exact.
    largest<true>(step, 0.5 + 0x1p-25, count, bound[0]);
    largest<false>(step, 1.5 - 0x1p-24, count, bound[1]);
    largest<true>(step, 2.5 + 0x1p-23, count, bound[2]);
  }

 private:
  // The largest fp32 number below factor * step, or at it; above everything if there is no step.
  template <bool kAtIt>
  static void largest(const float* step, double factor, int64_t count, float* out) {
    constexpr int kHalf = kLanes / 2;
    typedef float Floats __attribute__((vector_size(4 * kHalf)));
    typedef double Doubles __attribute__((vector_size(8 * kHalf)));
    typedef int32_t Bits __attribute__((vector_size(4 * kHalf)));
    for (int64_t i = 0; i < count; i += kHalf) {
      Floats by;
      std::memcpy(&by, step + i, sizeof by);
      const Doubles limit = __builtin_convertvector(by, Doubles) * factor;
      const Floats near = __builtin_convertvector(limit, Floats);
      // Its sign is what counts.
      const Floats short_of =
          __builtin_convertvector((limit - __builtin_convertvector(near, Doubles)) * 0x1p60, Floats);
      const Bits beyond = kAtIt ? short_of < 0 : short_of <= 0;  // -1 where it is
      const Floats below = (Floats)((Bits)near + beyond);
      const Floats found = by > 0 ? below : Floats{} + std::numeric_limits<float>::infinity();
      std::memcpy(out + i, &found, sizeof found);
    }
  }
};

constexpr float kRound = 0x1p23f;  // adding it rounds to an integer, half to even, which the lowest bits then hold

// The lowest byte of each lane's bits.
inline void store_low_bytes(uint8_t* out, vf x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_castps_si512(x)));
#else
  uint32_t bits[kLanes];
  std::memcpy(bits, &x, sizeof bits);
  for (int l = 0; l < kLanes; ++l) out[l] = uint8_t(bits[l]);
#endif
}

// How the parameters of kLanes elements are got: each has its own, or all share them.
struct OwnParameters {
  const float *lo, *step, *inverse, *limit, *top;

  OwnParameters(const float* low, const Steps& s)
      : lo(low), step(s.step), inverse(s.inverse), limit(s.limit), top(s.top) {}
  static vf vector(const float* p, int64_t i) { return load(p + i); }
  static float scalar(const float* p, int64_t i) { return p[i]; }
};
struct SharedParameters {
  float lo, step, inverse, limit, top;

  SharedParameters(const float* low, const Steps& s, int64_t i)
      : lo(low[i]), step(s.step[i]), inverse(s.inverse[i]), limit(s.limit[i]), top(s.top[i]) {}
  static vf vector(float x, int64_t) { return splat(x); }
  static float scalar(float x, int64_t) { return x; }
};

// Of `count` elements. The code is that of (x - lo) / step, rounded. A product with the inverse is nearly that: where
// it is so close to a half that it might round otherwise, the division is done.
template <class Parameters>
void code_affine(const float* x, int64_t count, const Parameters& p, uint8_t* codes) {
  const vf zero = splat(0.0f), one = splat(1.0f), half = splat(0.5f), round = splat(kRound);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vf above = load(x + i) - p.vector(p.lo, i), top = p.vector(p.top, i);
    const auto clamped = [&](vf y) {
      y = select(greater(y, zero), y, zero);
      return select(greater(top, y), y, top);
    };
    vf y = clamped(above * p.vector(p.inverse, i)), rounded = y + round;
    const vf from_half = absolute(absolute(y - (rounded - round)) - half);
    if (any(greater(p.vector(p.limit, i), from_half))) {
      const vf step = p.vector(p.step, i);
      rounded = clamped(above / select(greater(step, zero), step, one)) + round;
    }
    store_low_bytes(codes + i, rounded);
  }
  for (; i < count; ++i) {
    const float step = p.scalar(p.step, i), top = p.scalar(p.top, i);
    float y = (x[i] - p.scalar(p.lo, i)) / (step > 0 ? step : 1.0f);
    y = y > 0 ? y : 0.0f;
    y = y < top ? y : top;
    codes[i] = uint8_t(int32_t(y + kRound - kRound));
  }
}

// The same for signs and trits, whose threshold is lo. A group with a NaN has no codes: its top is 0.
template <class Parameters>
void code_signs(KvKind kind, const float* x, int64_t count, const Parameters& p, uint8_t* codes) {
  const vf zero = splat(0.0f), one = splat(1.0f), two = splat(2.0f), round = splat(kRound);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const vf value = load(x + i);
    const vf code = kind == KvKind::sign ? select(greater(zero, value), zero, one)
                                         : select(greater(absolute(value), p.vector(p.lo, i)),
                                                  select(greater(value, zero), two, zero), one);
    store_low_bytes(codes + i, select(greater(p.vector(p.top, i), zero), code, zero) + round);
  }
  for (; i < count; ++i) {
    const int trit = magnitude(x[i]) > p.scalar(p.lo, i) ? (x[i] > 0 ? 2 : 0) : 1;
    codes[i] = uint8_t(p.scalar(p.top, i) > 0 ? (kind == KvKind::sign ? !(x[i] < 0) : trit) : 0);
  }
}

template <class Parameters>
void code(KvKind kind, const float* x, int64_t count, const Parameters& p, uint8_t* codes) {
  if (kind == KvKind::affine) return code_affine(x, count, p, codes);
  code_signs(kind, x, count, p, codes);
}

// Whether rows of a part are coded by code_two_bits.
inline bool fits_two_bits(const KvSide& side, const KvPart& part) {
  return part.kind == KvKind::affine && part.bits == 2 && (!side.two_classes || side.own_arrays) &&
         part.channels % (4 * kLanes) == 0 && (!side.per_token || side.group % kLanes == 0);
}

// A row of 2-bit codes as it lies in the record. `place_of(c)`: where lo and bounds of channel c are, of kLanes
// channels that have them one after the other, or else in common.
template <bool kCommon, class PlaceOf>
void code_two_bits(const float* x, int64_t channels, const float* lo, const Bounds& b, const PlaceOf& place_of,
                   uint8_t* row) {
  const auto read = [](const float* p) { return kCommon ? splat(*p) : load(p); };
  const int64_t bytes = channels / 4;
  for (int64_t i = 0; i < bytes; i += kLanes) {
    vf sum = splat(kRound);
#pragma GCC unroll 4
    for (int plane = 0; plane < 4; ++plane) {
      const int64_t c = plane * bytes + i, place = place_of(c);
      const vf above = load(x + c) - read(lo + place), weight = splat(float(1 << 2 * plane));
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) sum = select(greater(above, read(b.bound[k] + place)), sum + weight, sum);
    }
    store_low_bytes(row + i, sum);
  }
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
