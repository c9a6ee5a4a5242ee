// See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"

namespace fastok::FASTOK_ISA {
namespace {

#if defined(__AVX512F__)
// 16 vectors to their transpose.
inline __attribute__((always_inline)) void transpose(vf (&r)[16]) {
  vf t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  const auto low = [](vf a, vf b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](vf a, vf b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  // r[4 i + c]: column c (and c + 4, c + 8, c + 12 in the further quarters) of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const vf a = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const vf d = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(d, e, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(d, e, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

#endif

}  // namespace
}  // namespace fastok::FASTOK_ISA
