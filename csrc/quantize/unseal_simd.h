// Unpacking: one page's rows from codes to numbers, in the order and the basis of the model.
// See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "quantize/coder_simd.h"
#include "quantize/quantize.h"

namespace fastok::FASTOK_ISA {
namespace {

// One row to fp32 in the order and the basis of the codes.
void dequantize_row(const KvFormat& fmt, const KvSide& side, const KvHalf& half, const uint8_t* codes, bool high,
                    int64_t rank, const float* scale, const float* zero, float* out) {
  RowCodes row;
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part_of(i, high);
    expand_row(codes, part.bits, part.channels, row.byte);
    codes += part.bytes();
    float* const to = out + part.first;
    if (!side.per_token) {
      for (int64_t d = 0; d < part.channels; ++d)
        to[d] = float(row.byte[d]) * scale[part.first + d] + zero[part.first + d];
      continue;
    }
    float scales[kMostChannels], zeros[kMostChannels];
    token_parameters(fmt, side, half, i, rank, scales, zeros);
    for (int64_t d = 0; d < part.channels; ++d) to[d] = float(row.byte[d]) * scales[d] + zeros[d];
  }
}

void write_row(const float* x, int64_t width, Dtype dtype, void* out, int64_t at) {
  switch (dtype) {
    case Dtype::f16:
      for (int64_t d = 0; d < width; ++d) narrow(x[d], static_cast<f16*>(out)[at + d]);
      return;
    case Dtype::bf16:
      for (int64_t d = 0; d < width; ++d) narrow(x[d], static_cast<bf16*>(out)[at + d]);
      return;
    default:
      std::memcpy(static_cast<float*>(out) + at, x, size_t(width) * sizeof(float));
  }
}

void unseal(const KvFormat& fmt, const KvPage& page, const uint8_t* data_end, const KvChannels channels[2], Dtype dtype,
            void* const out[2], int64_t stride, void* memory) {
  float* const scale = static_cast<float*>(memory);  // which has room for more
  float *const zero = scale + kMostChannels, *const coded = zero + kMostChannels, *const plain = coded + kMostChannels;
  for (int which = 0; which < 2; ++which) {
    const KvSide& side = which ? fmt.value : fmt.key;
    const KvHalf& half = which ? page.value : page.key;
    const int64_t width = side.width, high_bytes = side.row_bytes(true);
    const int64_t low_bytes = side.row_bytes(false);
    int64_t high_rank = 0, low_rank = 0, slot = 0;
    for (int64_t t = 0; t < page.n; ++t) {
      const bool high = page.is_high(t);
      const int64_t rank = high ? high_rank++ : page.n_high + low_rank++;
      if (!side.per_token) {
        const bool next = t == page.groups_end[slot];
        slot += next;
        if (t == 0 || next || side.two_classes) channel_parameters(fmt, side, half, slot, high, scale, zero);
      }
      const int64_t bytes = high ? high_bytes : low_bytes;
      const uint8_t* codes =
          half.codes + (high ? rank * high_bytes : page.n_high * high_bytes + (rank - page.n_high) * low_bytes);
      uint8_t copy[kMostChannels + 2 * kSlack];
      if (data_end - codes < bytes + kSlack) codes = static_cast<uint8_t*>(std::memcpy(copy, codes, size_t(bytes)));
      dequantize_row(fmt, side, half, codes, high, rank, scale, zero, coded);
      const KvChannels& of = channels[which];
      const int64_t easy = side.part[0].fourier ? side.part[0].channels : 0;
      for (int64_t i = 0; i < easy; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < easy; ++j) sum += of.basis[i * easy + j] * (coded[j] * fourier_weight(easy, j));
        plain[of.order ? of.order[i] : i] = sum;
      }
      for (int64_t d = easy; d < width; ++d) {
        const int64_t to = of.order ? of.order[d] : d;
        plain[to] = of.factor ? coded[d] * widen(of.factor[d]) : coded[d];
      }
      write_row(plain, width, dtype, out[which], t * stride);
    }
  }
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
