// Decode attention, a block of keys or one page at a time: logits of all rows, softmax relative to the peak so far,
// weighted sums.
#include "decode/decode.h"

#include "decode/packed_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

template <class T>
void dense(const DecodeRows& rows, const DenseKeys& keys, const DecodeState& state, void* memory) {
  const Scratch s(rows.count, keys.width > keys.v_width ? keys.width : keys.v_width, memory);
  const T* const* const k = reinterpret_cast<const T* const*>(keys.k);
  const T* const* const v = reinterpret_cast<const T* const*>(keys.v);
  const auto next = [&](const void* const* rows_of, int64_t begin, int64_t width) {
    const int64_t left = keys.count - begin;
    return NextRows{rows_of + begin, left < kDecodeBlock ? left : kDecodeBlock, width * int64_t(sizeof(T)),
                    keys.scattered};
  };
  for (int64_t i = 0; i < kDecodeBlock; ++i) next(keys.k, 0, keys.width).fetch(i);
  for (int64_t begin = 0; begin < keys.count; begin += kDecodeBlock) {
    const int64_t left = keys.count - begin, n = left < kDecodeBlock ? left : kDecodeBlock;
    dots(k + begin, n, 0, rows.q, decode_pitch(keys.width), rows.count, keys.width, s.logits, Scratch::kPitch,
         next(keys.v, begin, keys.v_width));
    soften(rows, n, keys.place + begin, keys.place[begin + n - 1], keys.v_width, s.logits, Scratch::kPitch, state);
    weighted_sum(v + begin, n, 0, s.logits, Scratch::kPitch, rows.count, keys.v_width, state.sum,
                 decode_pitch(keys.v_width), next(keys.k, begin + n, keys.width));
  }
}

void dense_keys(const DecodeRows& rows, const DenseKeys& keys, const DecodeState& state, void* memory) {
  switch (keys.dtype) {
    case Dtype::f16:
      return dense<f16>(rows, keys, state, memory);
    case Dtype::bf16:
      return dense<bf16>(rows, keys, state, memory);
    default:
      return dense<float>(rows, keys, state, memory);
  }
}

template <class T>
void widen_scaled(const void* x, int64_t width, float factor, float* out) {
  for (int64_t d = 0; d < width; ++d) out[d] = widen(static_cast<const T*>(x)[d]) * factor;
}

void prepare(const void* q, Dtype dtype, int64_t width, float factor, const KvSide* side, const KvChannels& channels,
             float* out) {
  float plain[kMostChannels];
  float* const to = side ? plain : out;
  if (dtype == Dtype::f16) {
    widen_scaled<f16>(q, width, factor, to);
  } else if (dtype == Dtype::bf16) {
    widen_scaled<bf16>(q, width, factor, to);
  } else {
    widen_scaled<float>(q, width, factor, to);
  }
  for (int64_t d = width; d < decode_pitch(width); ++d) out[d] = 0;
  if (!side) return;
  float coded[kMostChannels];
  for (int64_t d = 0; d < width; ++d) {
    const int64_t from = channels.order ? channels.order[d] : d;
    coded[d] = channels.factor ? plain[from] * widen(channels.factor[from]) : plain[from];
  }
  const int64_t easy = side->part[0].fourier ? side->part[0].channels : 0;
  // Parseval: <q, k> is the weighted inner product of the spectra.
  for (int64_t j = 0; j < easy; ++j) out[j] = 0;
  for (int64_t i = 0; i < easy; ++i)
    for (int64_t j = 0; j < easy; ++j) out[j] += coded[i] * channels.basis[i * easy + j];
  for (int64_t j = 0; j < easy; ++j) out[j] *= fourier_weight(easy, j);
  for (int64_t d = easy; d < width; ++d) out[d] = coded[d];
}

void finish(const DecodeState& state, int64_t rows, int64_t width, const KvSide* side, const KvChannels& channels,
            float* out, float* lse) {
  for (int64_t r = 0; r < rows; ++r) {
    const float total = state.total[r];
    const bool none = total == 0;
    lse[r] = none ? -kInfinity : state.peak[r] + __builtin_logf(total);
    const float inverse = none ? 0.0f : 1.0f / total;
    const float* const sum = state.sum + r * decode_pitch(width);
    float* const to = out + r * width;
    const int64_t easy = side && side->part[0].fourier ? side->part[0].channels : 0;
    float weighted[kMostChannels];
    for (int64_t j = 0; j < easy; ++j) weighted[j] = sum[j] * fourier_weight(easy, j);
    for (int64_t i = 0; i < easy; ++i) {
      const float* const row = channels.basis + i * easy;
      vf x = splat(0.0f);
      int64_t j = 0;
      for (; j + kLanes <= easy; j += kLanes) x = fma(load(row + j), load(weighted + j), x);
      if (j < easy) x = fma(load_part(row + j, easy - j), load_part(weighted + j, easy - j), x);
      to[channels.order ? channels.order[i] : i] = horizontal_sum(x) * inverse;
    }
    for (int64_t d = easy; d < width; ++d) {
      const float factor = side && channels.factor ? widen(channels.factor[d]) : 1.0f;
      to[side && channels.order ? channels.order[d] : d] = sum[d] * inverse * factor;
    }
  }
}

}  // namespace

extern const DecodeKernels decode_kernels;
const DecodeKernels decode_kernels = {scratch_bytes, prepare, dense_keys, packed, finish};

}  // namespace fastok::FASTOK_ISA
