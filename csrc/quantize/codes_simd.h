// Codes in bytes, parameters, and the spectrum of sign-coded channels, for packing and for decoding.
// See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"
#include "quantize/kv_format.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr int64_t kSlack = 32;  // bytes that expand_row may write behind its last channel, or read behind its row

// 32 bytes at a time as 64-bit words: what is shifted in from a neighbouring byte is masked.
struct Words {
  uint64_t word[4];
};

template <int kBits>
inline __attribute__((always_inline)) void expand_planes(const uint8_t* row, int64_t bytes, uint8_t* out) {
  constexpr uint64_t kMask = kBits == 1 ? 0x0101010101010101 : kBits == 2 ? 0x0303030303030303 : 0x0f0f0f0f0f0f0f0f;
#pragma GCC unroll 8
  for (int plane = 0; plane < 8 / kBits; ++plane) {
    for (int64_t i = 0; i < bytes; i += 32) {
      Words x;
      std::memcpy(&x, row + i, sizeof x);
      for (int w = 0; w < 4; ++w) x.word[w] = x.word[w] >> (kBits * plane) & kMask;
      std::memcpy(out + plane * bytes + i, &x, sizeof x);
    }
  }
}

inline __attribute__((always_inline)) void expand_trits(const uint8_t* row, int64_t bytes, uint8_t* out) {
  for (int64_t i = 0; i < bytes; i += 32) {
    uint8_t rest[32];
    std::memcpy(rest, row + i, sizeof rest);
    uint8_t digit[5][32];
    constexpr uint8_t kPower[5] = {1, 3, 9, 27, 81};
#pragma GCC unroll 5
    for (int plane = 4; plane >= 0; --plane) {
      const uint8_t power = kPower[plane], twice = uint8_t(2 * power);
      for (int l = 0; l < 32; ++l) {
        const uint8_t one = rest[l] >= power ? 1 : 0, two = rest[l] >= twice ? 1 : 0;
        digit[plane][l] = uint8_t(one + two);
        rest[l] = uint8_t(rest[l] - (rest[l] >= twice ? twice : rest[l] >= power ? power : 0));
      }
    }
    // The last plane first where blocks overlap: what a block writes too much belongs to the next one.
    for (int plane = 0; plane < 5; ++plane) std::memcpy(out + plane * bytes + i, digit[plane], 32);
  }
}

// The codes of `channels` channels, one byte each. Writes up to kSlack bytes more and reads up to kSlack behind
// `bytes`.
inline void expand_row(const uint8_t* row, int bits, int64_t channels, uint8_t* out) {
  const int64_t bytes = kv_code_bytes(bits, channels);
  switch (bits) {
    case 0:
      if (bytes <= 32) {
        expand_trits(row, bytes, out);
      } else {  // blocks would overwrite each other's planes
        for (int64_t i = 0; i < bytes; ++i) {
          int rest = row[i];
          for (int plane = 0; plane < 5; ++plane, rest /= 3) out[plane * bytes + i] = uint8_t(rest % 3);
        }
      }
      return;
    case 1:
      return expand_planes<1>(row, bytes, out);
    case 2:
      return expand_planes<2>(row, bytes, out);
    case 4:
      return expand_planes<4>(row, bytes, out);
    default:
      std::memcpy(out, row, size_t(channels));
  }
}

// The inverse; `codes` must be 0 from `channels` to the end of the last plane (and readable for kSlack bytes more).
inline void pack_row(const uint8_t* codes, int bits, int64_t channels, uint8_t* row) {
  const int64_t bytes = kv_code_bytes(bits, channels);
  const int planes = bits == 0 ? 5 : 8 / bits;
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t sum = 0;
    uint64_t weight = 1;
    for (int plane = 0; plane < planes; ++plane) {
      uint64_t x;
      std::memcpy(&x, codes + plane * bytes + i, sizeof x);
      sum += x * weight;  // bytes never overflow into their neighbours
      weight = bits == 0 ? weight * 3 : weight << (bits & 7);
    }
    std::memcpy(row + i, &sum, size_t(bytes - i < 8 ? bytes - i : 8));
  }
}

// `count` parameters from the i-th on as fp32.
inline void read_scales(const uint8_t* array, KvScale scale, int64_t i, int64_t count, float* out) {
  const auto widen_all = [&](auto sample) {
    using S = decltype(sample);
    const S* const p = reinterpret_cast<const S*>(array) + i;
    int64_t d = 0;
    for (; d + kLanes <= count; d += kLanes) store(out + d, load(p + d));
    for (; d < count; ++d) out[d] = widen(p[d]);
  };
  if (scale == KvScale::f16) return widen_all(f16{});
  if (scale == KvScale::bf16) return widen_all(bf16{});
  widen_all(0.0f);
}

// The largest code of an affine part.
inline float top_code(const KvPart& part) { return float((1 << part.bits) - 1); }

// x = code * scale + zero for `count` channels of one part, whose groups have these parameters: scale[i], zero[i].
inline void finish_parameters(const KvSide& side, const KvPart& part, int64_t count, float* scale, float* zero) {
  for (int64_t i = 0; i < count; ++i) {
    const float s = scale[i];
    if (part.kind == KvKind::trit) {
      // A NaN says that the group could not be stored, whatever the numerics.
      scale[i] = side.compat ? 1.0f + 0.0f * s : s;
      zero[i] = -scale[i];
    } else if (!(side.compat && part.fourier)) {
      scale[i] = 2 * s;
      zero[i] = -s;
    } else {
      zero[i] = i <= part.channels / 2 ? 0.0f * s : -0.5f * s;
    }
  }
}

// The parameters of all channels in the order of the codes, from row `slot` of arrays along channels.
inline void channel_parameters(const KvFormat& fmt, const KvSide& side, const KvHalf& half, int64_t slot, bool high,
                               float* scale, float* zero) {
  const bool own_arrays = side.own_arrays && !high;
  const uint8_t* array = own_arrays ? half.low_params : half.params;
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part_of(i, high);
    const int64_t size = (own_arrays ? 1 : half.param_rows) * part.channels * side.scale_bytes;
    read_scales(array, fmt.scale, slot * part.channels, part.channels, scale + part.first);
    array += size;
    if (part.kind == KvKind::affine) {
      read_scales(array, fmt.scale, slot * part.channels, part.channels, zero + part.first);
      array += size;
      if (side.shares_ranges())
        for (int64_t d = 0; d < part.channels; ++d) scale[part.first + d] /= top_code(part);
    } else {
      finish_parameters(side, part, part.channels, scale + part.first, zero + part.first);
    }
  }
}

// The parameters of all channels of one part, of the token in row `row`.
inline void token_parameters(const KvFormat& fmt, const KvSide& side, const KvHalf& half, int part_index, int64_t row,
                             float* scale, float* zero) {
  const uint8_t* array = half.params;
  for (int i = 0; i < part_index; ++i)
    array += half.param_rows * side.part[i].arrays() * side.groups_of(side.part[i]) * side.scale_bytes;
  const KvPart& part = side.part[part_index];
  const int64_t groups = side.groups_of(part);
  const auto read = [&](const uint8_t* from, float* to) {
    float of_group[kMostChannels];
    read_scales(from, fmt.scale, row * groups, groups, of_group);
    for (int64_t d = 0; d < part.channels; ++d) to[d] = of_group[d / side.group];
  };
  read(array, scale);
  if (part.kind == KvKind::affine) return read(array + half.param_rows * groups * side.scale_bytes, zero);
  finish_parameters(side, part, part.channels, scale, zero);
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
