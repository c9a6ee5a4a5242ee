// Decode attention, a block of keys or one page at a time: logits of all rows, softmax relative to the peak so far,
// weighted sums.
#include "decode/decode.h"

#include "decode/packed_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// Keys, and values, of one head that are read at a time, before those of the next head.
constexpr int64_t kKeysAtOnce = 8, kValuesAtOnce = 16;
// How many rows further is fetched: of one or two heads, or of more.
constexpr int64_t kFarRowsOfFew = 64, kFarRows = 16;
static_assert(kFarRowsOfFew + kMostStretches <= kRowsAhead && kFarRows + kMostStretches <= kRowsAhead);

template <class T>
void dense(const DenseHead* heads, int64_t n_heads, const DenseKeys& keys, void* memory) {
  int64_t n_rows = 0;
  for (int64_t h = 0; h < n_heads; ++h) n_rows += heads[h].rows.count;
  const Scratch s(n_rows, keys.width > keys.v_width ? keys.width : keys.v_width, memory);
  const T* const* const row = reinterpret_cast<const T* const*>(keys.row);
  const int64_t far = n_heads <= 2 ? kFarRowsOfFew : kFarRows;
  // From row `i` on, of all heads.
  const auto ahead = [&](int64_t i, int64_t DenseHead::* at, int64_t width) {
    const int64_t element = int64_t(sizeof(T)), stride = n_heads > 1 ? heads[1].*at - heads[0].*at : 0;
    return Ahead(keys.row + i + far, keys.stretches, n_heads, stride * element, width * element);
  };
  // A head alone: the fewer times, the better for many rows.
  const int64_t values_at_once = n_heads > 1 ? kValuesAtOnce : kDecodeBlock;
  // Calls each(head, row, n, logits) until all heads have had `n` rows.
  const auto side_by_side = [&](int64_t n, int64_t at_once, const auto& each) {
    for (int64_t i = 0; i < n; i += at_once) {
      const int64_t count = n - i < at_once ? n - i : at_once;
      float* logits = s.logits + i;
      for (int64_t h = 0; h < n_heads; logits += heads[h++].rows.count * kDecodeBlock) each(h, i, count, logits);
    }
  };
  for (int64_t begin = 0; begin < keys.count; begin += kDecodeBlock) {
    const int64_t left = keys.count - begin, n = left < kDecodeBlock ? left : kDecodeBlock;
    const int64_t k = 2 * begin, v = k + n;
    Ahead next = ahead(k, &DenseHead::k_at, keys.width);
    side_by_side(n, kKeysAtOnce, [&](int64_t h, int64_t i, int64_t count, float* logits) {
      dots(row + k + i, count, heads[h].k_at, heads[h].rows.q, decode_pitch(keys.width), heads[h].rows.count,
           keys.width, logits, kDecodeBlock, next);
    });
    const int32_t* const place = keys.place + begin;
    int32_t newest = place[0];
    for (int64_t i = 1; i < n; ++i) newest = place[i] > newest ? place[i] : newest;
    next = ahead(v, &DenseHead::v_at, keys.v_width);
    side_by_side(n, n, [&](int64_t h, int64_t, int64_t count, float* logits) {
      // So that memory does not idle meanwhile.
      for (int64_t left = count * lines_of<T>(keys.v_width) / kFetchedBefore; left >= 8; left -= 8)
        next.template fetch<8>();
      soften(heads[h].rows, count, place, newest, keys.v_width, logits, kDecodeBlock, heads[h].state);
    });
    side_by_side(n, values_at_once, [&](int64_t h, int64_t i, int64_t count, float* logits) {
      weighted_sum(row + v + i, count, heads[h].v_at, logits, kDecodeBlock, heads[h].rows.count, keys.v_width,
                   heads[h].state.sum, decode_pitch(keys.v_width), next);
    });
  }
}

void dense_keys(const DenseHead* heads, int64_t n_heads, const DenseKeys& keys, void* memory) {
  switch (keys.dtype) {
    case Dtype::f16:
      return dense<f16>(heads, n_heads, keys, memory);
    case Dtype::bf16:
      return dense<bf16>(heads, n_heads, keys, memory);
    default:
      return dense<float>(heads, n_heads, keys, memory);
  }
}

// Times `factor`; in `pairs`, as dots() wants it.
template <class T>
void widen_scaled(const void* from, int64_t width, float factor, bool pairs, float* out) {
  const T* const x = static_cast<const T*>(from);
  int64_t d = 0;
  for (; pairs && d + 2 * kLanes <= width; d += 2 * kLanes) {
    vf a, b;
    load_pair(x + d, a, b);
    store(out + d, a * splat(factor));
    store(out + d + kLanes, b * splat(factor));
  }
  for (; d < width; ++d) out[d] = widen(x[d]) * factor;
}

// out[j] = sum over i of x[i] * basis[i][j].
void spectrum_of(const float* x, int64_t n, const float* basis, float* out) {
  const auto tile = [&](auto vectors, int64_t j) {
    vf sum[vectors.count];
    for (vf& of : sum) of = splat(0.0f);
    for (int64_t i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < vectors.count; ++v) sum[v] = fma(load(basis + i * n + j + v * kLanes), splat(x[i]), sum[v]);
    for (int v = 0; v < vectors.count; ++v) store(out + j + v * kLanes, sum[v]);
  };
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes) tile(Rows<4>(), j);
  for (; j + kLanes <= n; j += kLanes) tile(Rows<1>(), j);
  for (; j < n; ++j) {
    out[j] = 0;
    for (int64_t i = 0; i < n; ++i) out[j] += x[i] * basis[i * n + j];
  }
}

void prepare(const void* q, Dtype dtype, int64_t width, float factor, const KvSide* side, const KvChannels& channels,
             float* out) {
  float plain[kMostChannels];
  float* const to = side ? plain : out;
  if (dtype == Dtype::f16) {
    widen_scaled<f16>(q, width, factor, !side, to);
  } else if (dtype == Dtype::bf16) {
    widen_scaled<bf16>(q, width, factor, !side, to);
  } else {
    widen_scaled<float>(q, width, factor, !side, to);
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
  spectrum_of(coded, easy, channels.basis, out);
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
