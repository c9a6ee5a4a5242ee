// Flash attention and the scores of blocks of the attention matrix, over packed keys and values. One block of rows
// meets one block of keys at a time: products, then the softmax on vectors, then the values.
#include "attention/attention.h"

#include "attention/exp_simd.h"
#include "cpu/simd.h"

#if defined(__AMX_BF16__)
#define FASTOK_AMX 1
#endif

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
void widen_row(const T* x, int64_t width, float factor, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(x + d) * splat(factor));
  for (; d < width; ++d) out[d] = widen(x[d]) * factor;
}

void widen_row(const HeadRows& rows, Dtype dtype, int64_t row, float factor, float* out) {
  const int64_t at = row * rows.stride;
  switch (dtype) {
    case Dtype::f16:
      return widen_row(static_cast<const f16*>(rows.data) + at, rows.width, factor, out);
    case Dtype::bf16:
      return widen_row(static_cast<const bf16*>(rows.data) + at, rows.width, factor, out);
    default:
      return widen_row(static_cast<const float*>(rows.data) + at, rows.width, factor, out);
  }
}

// Tokens of one head lie a page apart, more than the hardware foresees.
constexpr int64_t kAhead = 12;
inline void prefetch_row(const HeadRows& rows, int64_t row) {
  if (row >= rows.count) return;
  const char* const at = static_cast<const char*>(rows.data) + row * rows.stride * rows.element_bytes;
  for (int64_t byte = 0; byte < rows.width * rows.element_bytes; byte += 64) __builtin_prefetch(at + byte);
}

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// ---- fp32 engine
// -----------------------------------------------------------------------------------------------------

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

template <int kPitch, class T>
void transpose_keys(const T* k, int64_t stride, int64_t width, float* out) {
  for (int64_t d = 0; d < width; d += kLanes) {
    vf r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = load(k + i * stride + d);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) store(out + (d + i) * kPitch, r[i]);
  }
}

// 16 keys from `first` on, to [width][kPitch].
template <int kPitch>
void transpose_keys(const HeadRows& k, Dtype dtype, int64_t first, float* out) {
  for (int64_t i = 0; i < kLanes; ++i) prefetch_row(k, first + kLanes + i);
  const int64_t at = first * k.stride;
  switch (dtype) {
    case Dtype::f16:
      return transpose_keys<kPitch>(static_cast<const f16*>(k.data) + at, k.stride, k.width, out);
    case Dtype::bf16:
      return transpose_keys<kPitch>(static_cast<const bf16*>(k.data) + at, k.stride, k.width, out);
    default:
      return transpose_keys<kPitch>(static_cast<const float*>(k.data) + at, k.stride, k.width, out);
  }
}
#endif

struct Fp32 {
  // A register tile of kTileRows x (2 vectors): accumulators, two columns and one broadcast fill the register file.
#if defined(__AVX512F__)
  static constexpr int kTileRows = 12;
#elif defined(__AVX2__)
  static constexpr int kTileRows = 6;
#else
  static constexpr int kTileRows = 4;
#endif
  static constexpr int kStep = 2 * kLanes;  // keys, or channels of the values, of a tile
  static constexpr int kRows = 48, kKeys = 128;
  static constexpr bool kScaledRows = true;  // the scale is in the packed rows
  using Weight = float;                      // of a value
  static_assert(kRows % kTileRows == 0 && kKeys % kStep == 0);

  static int64_t padded(int64_t width) { return round_up(width, kStep); }
  static size_t row_bytes(int64_t width) { return size_t(kRows * width) * sizeof(float); }
  static size_t key_bytes(int64_t n, int64_t width) { return size_t(round_up(n, kStep) * width) * sizeof(float); }
  static size_t value_bytes(int64_t n, int64_t width) {
    return size_t(round_up(n, kStep) * padded(width)) * sizeof(float);
  }

  // [panel][width][kTileRows]
  static void pack_rows(const AttentionHead& head, const RowList& rows, void* out_bytes) {
    float* const out = static_cast<float*>(out_bytes);
    const int64_t width = head.q.width;
    float row[256];
    for (int64_t i = 0; i < round_up(rows.count, kTileRows); ++i) {
      float* const column = out + i / kTileRows * kTileRows * width + i % kTileRows;
      if (i + kAhead < rows.count) prefetch_row(head.q, rows.at(i + kAhead));
      if (i < rows.count) widen_row(head.q, head.dtype, rows.at(i), head.scale, row);
      for (int64_t d = 0; d < width; ++d) column[d * kTileRows] = i < rows.count ? row[d] : 0.0f;
    }
  }
  // [panel][width][kStep]
  static void pack_keys(const HeadRows& k, Dtype dtype, int64_t begin, int64_t end, void* out_bytes) {
    float* const out = static_cast<float*>(out_bytes);
    float row[256];
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + kLanes <= end - begin && k.width % kLanes == 0; j += kLanes)
      transpose_keys<kStep>(k, dtype, begin + j, out + j / kStep * kStep * k.width + j % kStep);
#endif
    for (; j < round_up(end - begin, kStep); ++j) {
      float* const column = out + j / kStep * kStep * k.width + j % kStep;
      prefetch_row(k, begin + j + kAhead);
      if (begin + j < end) widen_row(k, dtype, begin + j, 1.0f, row);
      for (int64_t d = 0; d < k.width; ++d) column[d * kStep] = begin + j < end ? row[d] : 0.0f;
    }
  }
  // [key][padded width]
  static void pack_values(const HeadRows& v, Dtype dtype, int64_t begin, int64_t end, void* out_bytes) {
    float* const out = static_cast<float*>(out_bytes);
    const int64_t width = padded(v.width);
    for (int64_t j = 0; j < round_up(end - begin, kStep); ++j) {
      float* const row = out + j * width;
      prefetch_row(v, begin + j + kAhead);
      if (begin + j < end) widen_row(v, dtype, begin + j, 1.0f, row);
      for (int64_t d = begin + j < end ? v.width : 0; d < width; ++d) row[d] = 0;
    }
  }

  // out[row][key] of packed rows and packed keys from `key` on, both in whole tiles.
  static void multiply(const void* rows, int64_t n_rows, const void* keys, int64_t key, int64_t n_keys, int64_t width,
                       float* out, int64_t pitch) {
    for (int64_t i = 0; i < n_rows; i += kTileRows)
      for (int64_t j = 0; j < n_keys; j += kStep)
        multiply_tile(static_cast<const float*>(rows) + i * width, static_cast<const float*>(keys) + (key + j) * width,
                      width, out + i * pitch + j, pitch);
  }
  static void multiply_tile(const float* a, const float* b, int64_t width, float* out, int64_t pitch) {
    vf acc[kTileRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) acc[i][0] = acc[i][1] = splat(0.0f);
    for (int64_t d = 0; d < width; ++d) {
      const vf b0 = load(b + d * kStep), b1 = load(b + d * kStep + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const vf x = splat(a[d * kTileRows + i]);
        acc[i][0] = fma(x, b0, acc[i][0]);
        acc[i][1] = fma(x, b1, acc[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      store(out + i * pitch, acc[i][0]);
      store(out + i * pitch + kLanes, acc[i][1]);
    }
  }

  // out[row][channel] += weight[row][key] * values[key from `key` on][channel]; of `n_packed` keys, in whole steps, and
  // of the padded width.
  static void add_values(const float* weight, int64_t n_rows, const void* values, int64_t, int64_t key, int64_t n_keys,
                         int64_t width, float* out) {
    const float* const v = static_cast<const float*>(values) + key * width;
    for (int64_t c = 0; c < width; c += kStep)
      for (int64_t i = 0; i < n_rows; i += kTileRows)
        add_values_tile(weight + i * kKeys, v + c, n_keys, width, out + i * width + c);
  }
  static void add_values_tile(const float* weight, const float* v, int64_t n_keys, int64_t width, float* out) {
    vf acc[kTileRows][2];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      acc[i][0] = load(out + i * width);
      acc[i][1] = load(out + i * width + kLanes);
    }
    for (int64_t j = 0; j < n_keys; ++j) {
      const vf v0 = load(v + j * width), v1 = load(v + j * width + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        const vf x = splat(weight[i * kKeys + j]);
        acc[i][0] = fma(x, v0, acc[i][0]);
        acc[i][1] = fma(x, v1, acc[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      store(out + i * width, acc[i][0]);
      store(out + i * width + kLanes, acc[i][1]);
    }
  }
  // Where a block's weights go: in place of its scores.
  static float* weights(float* scores, void*) { return scores; }
};

// ---- bf16 engine: AMX tiles
// --------------------------------------------------------------------------------------------
#if defined(FASTOK_AMX)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Scores of bf16 products are exact up to fp32 summation; weights of values are rounded to bf16.
struct Bf16 {
  static constexpr int kTile = 16, kDepth = 32, kStep = 32, kBlock = kTile * kDepth;
  static constexpr int kTileRows = 32;
  static constexpr int kRows = 32, kKeys = 640;
  static constexpr bool kScaledRows = false;
  using Weight = bf16;

  static int64_t padded(int64_t width) { return round_up(width, 32); }
  static size_t row_bytes(int64_t width) { return size_t(kRows * padded(width)) * sizeof(bf16); }
  static size_t key_bytes(int64_t n, int64_t width) {
    return size_t(round_up(n, kStep) * padded(width)) * sizeof(bf16);
  }
  static size_t value_bytes(int64_t n, int64_t width) { return key_bytes(n, width); }

  // [row][padded width]
  static void pack_rows(const AttentionHead& head, const RowList& rows, void* out_bytes) {
    bf16* const out = static_cast<bf16*>(out_bytes);
    const int64_t width = head.q.width, pitch = padded(width);
    for (int64_t i = 0; i < round_up(rows.count, kTileRows); ++i) {
      bf16* const row = out + i * pitch;
      if (i + kAhead < rows.count) prefetch_row(head.q, rows.at(i + kAhead));
      std::memset(row, 0, size_t(pitch) * sizeof(bf16));
      if (i < rows.count)
        std::memcpy(row, static_cast<const bf16*>(head.q.data) + rows.at(i) * head.q.stride,
                    size_t(width) * sizeof(bf16));
    }
  }
  // [16 keys][depth block][pair of depths][key][2]
  static void pack_keys(const HeadRows& k, Dtype, int64_t begin, int64_t end, void* out_bytes) {
    uint32_t* const out = static_cast<uint32_t*>(out_bytes);
    const int64_t blocks = padded(k.width) / kDepth;
    alignas(64) uint32_t row[256 / 2];
    for (int64_t j = 0; j < round_up(end - begin, kStep); ++j) {
      prefetch_row(k, begin + j + kAhead);
      std::memset(row, 0, size_t(blocks) * kDepth * sizeof(bf16));
      if (begin + j < end)
        std::memcpy(row, static_cast<const bf16*>(k.data) + (begin + j) * k.stride, size_t(k.width) * sizeof(bf16));
      uint32_t* const column = out + j / kTile * blocks * (kBlock / 2) + j % kTile;
      for (int64_t pair = 0; pair < blocks * kDepth / 2; ++pair) column[pair * kTile] = row[pair];
    }
  }
  // [16 channels][32 keys][pair of keys][channel][2]
  static void pack_values(const HeadRows& v, Dtype, int64_t begin, int64_t end, void* out_bytes) {
    bf16* const out = static_cast<bf16*>(out_bytes);
    const int64_t n = round_up(end - begin, kStep), channels = padded(v.width);
    // Two keys at a time, whose elements lie side by side.
    alignas(64) uint16_t rows[2][256];
    std::memset(rows, 0, sizeof rows);
    for (int64_t key = 0; key < n; key += 2) {
      for (int i = 0; i < 2; ++i) {
        const int64_t j = begin + key + i;
        prefetch_row(v, j + kAhead);
        if (j < end) {
          std::memcpy(rows[i], static_cast<const bf16*>(v.data) + j * v.stride, size_t(v.width) * sizeof(bf16));
        } else {
          std::memset(rows[i], 0, sizeof rows[i]);
        }
      }
      bf16* const at = out + key / kDepth * kBlock + key % kDepth / 2 * kTile * 2;
      for (int64_t c = 0; c < channels; c += kTile) {
        uint32_t pairs[kTile];
        for (int i = 0; i < kTile; ++i) pairs[i] = rows[0][c + i] | uint32_t(rows[1][c + i]) << 16;
        std::memcpy(at + c / kTile * (n / kDepth) * kBlock, pairs, sizeof pairs);
      }
    }
  }

  static void multiply(const void* rows, int64_t n_rows, const void* keys, int64_t key, int64_t n_keys, int64_t width,
                       float* out, int64_t pitch) {
    const int64_t depth = padded(width), blocks = depth / kDepth;
    const size_t row_pitch = size_t(depth) * sizeof(bf16), out_pitch = size_t(pitch) * sizeof(float);
    for (int64_t i = 0; i < n_rows; i += kTileRows) {
      const bf16* const a0 = static_cast<const bf16*>(rows) + i * depth;
      const bf16* const a1 = a0 + kTile * depth;
      for (int64_t j = 0; j < n_keys; j += kStep) {
        const bf16* const b0 = static_cast<const bf16*>(keys) + (key + j) / kTile * blocks * kBlock;
        const bf16* const b1 = b0 + blocks * kBlock;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t block = 0; block < blocks; ++block) {
          _tile_loadd(4, a0 + block * kDepth, row_pitch);
          _tile_loadd(6, b0 + block * kBlock, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b1 + block * kBlock, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, a1 + block * kDepth, row_pitch);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        store_tiles(out + i * pitch + j, pitch, out_pitch);
      }
    }
  }
  static void store_tiles(float* out, int64_t pitch, size_t pitch_bytes) {
    _tile_stored(0, out, pitch_bytes);
    _tile_stored(1, out + kTile, pitch_bytes);
    _tile_stored(2, out + kTile * pitch, pitch_bytes);
    _tile_stored(3, out + kTile * pitch + kTile, pitch_bytes);
  }

  static void add_values(const bf16* weight, int64_t n_rows, const void* values, int64_t n_packed, int64_t key,
                         int64_t n_keys, int64_t width, float* out) {
    const size_t out_pitch = size_t(width) * sizeof(float);
    constexpr size_t weight_pitch = kKeys * sizeof(bf16);
    for (int64_t c = 0; c < width; c += 2 * kTile) {
      const bf16* const b0 =
          static_cast<const bf16*>(values) + (c / kTile * (n_packed / kDepth) + key / kDepth) * kBlock;
      const bf16* const b1 = b0 + n_packed / kDepth * kBlock;
      for (int64_t i = 0; i < n_rows; i += kTileRows) {
        float* const to = out + i * width + c;
        _tile_loadd(0, to, out_pitch);
        _tile_loadd(1, to + kTile, out_pitch);
        _tile_loadd(2, to + kTile * width, out_pitch);
        _tile_loadd(3, to + kTile * width + kTile, out_pitch);
        for (int64_t block = 0; block < n_keys / kDepth; ++block) {
          _tile_loadd(4, weight + i * kKeys + block * kDepth, weight_pitch);
          _tile_loadd(6, b0 + block * kBlock, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_loadd(7, b1 + block * kBlock, 64);
          _tile_dpbf16ps(1, 4, 7);
          _tile_loadd(5, weight + (i + kTile) * kKeys + block * kDepth, weight_pitch);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        store_tiles(to, width, out_pitch);
      }
    }
  }
  static bf16* weights(float*, void* scratch) { return static_cast<bf16*>(scratch); }
};
#endif

// ---- the softmax on a block of scores -------------------------------------------------------------------------------

// Logits of one row in place: scale (if it is not in the rows already), softcap, bias, and -inf for the keys that the
// row does not see. x[0] is key `begin` of `n`, in whole vectors. Returns the factor that is left to apply.
template <class E>
inline __attribute__((always_inline)) float finish_logits(const AttentionHead& head, int64_t row, int64_t begin,
                                                          int64_t end, int64_t n, float* x) {
  float factor = E::kScaledRows ? 1.0f : head.scale;
  if (head.softcap > 0 || head.bias || !(factor > 0)) {
    const vf inner = splat(head.softcap > 0 ? factor / head.softcap : factor), cap = splat(head.softcap);
    for (int64_t j = 0; j < n; j += kLanes) {
      vf logits = load(x + j) * inner;
      if (head.softcap > 0) logits = tanh_of(logits) * cap;
      store(x + j, logits);
    }
    for (int64_t j = 0; head.bias && j < end - begin; ++j) x[j] += head.bias[begin + j];
    factor = 1.0f;
  }
  const int64_t first = head.first_key(row) - begin,
                last = (head.last_key(row) < end ? head.last_key(row) : end) - begin;
  for (int64_t j = 0; j < first && j < n; ++j) x[j] = -kInfinity;
  for (int64_t j = last > 0 ? last : 0; j < n; ++j) x[j] = -kInfinity;
  return factor;
}

inline float peak_of(const float* x, int64_t n) {
  vf peak = splat(-kInfinity);
  for (int64_t j = 0; j < n; j += kLanes) peak = maximum(load(x + j), peak);
  return horizontal_max(peak);
}

inline void store_weights(float* p, vf x) { store(p, x); }
#if defined(FASTOK_AMX)
// The machine's own rounding makes subnormal numbers 0, which weights may be.
inline void store_weights(bf16* p, vf x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(x);
  std::memcpy(p, &rounded, sizeof rounded);
}
#endif

// exp(x * factor - shift), stored as weights. Returns the sum.
template <class Weight>
float exponentials(const float* x, int64_t n, float factor, float shift, Weight* weights) {
  vf sum = splat(0.0f);
  for (int64_t j = 0; j < n; j += kLanes) {
    const vf e = exp2_of(fma(load(x + j), splat(factor * kLog2E), splat(-shift * kLog2E)));
    store_weights(weights + j, e);
    sum = sum + e;
  }
  return horizontal_sum(sum);
}

// The running softmax of a block's rows.
struct Running {
  float peak[64], total[64];
};

template <class E>
struct Scratch {
  void* rows;
  float* scores;  // [kRows][kKeys]
  void* weights;  // [kRows][kKeys]
  float* out;     // [kRows][padded value width]
  static size_t part(size_t bytes) { return (bytes + 63) / 64 * 64; }
  static size_t bytes(int64_t width, int64_t v_width) {
    return part(E::row_bytes(width)) + part(E::kRows * E::kKeys * sizeof(float)) +
           part(E::kRows * E::kKeys * sizeof(typename E::Weight)) +
           part(size_t(E::kRows * E::padded(v_width)) * sizeof(float));
  }
  Scratch(void* memory, int64_t width) {
    char* at = static_cast<char*>(memory);
    rows = at;
    at += part(E::row_bytes(width));
    scores = reinterpret_cast<float*>(at);
    at += part(E::kRows * E::kKeys * sizeof(float));
    weights = at;
    at += part(E::kRows * E::kKeys * sizeof(typename E::Weight));
    out = reinterpret_cast<float*>(at);
  }
};

RowList part_of(const RowList& rows, int64_t begin, int64_t most) {
  const int64_t count = rows.count - begin < most ? rows.count - begin : most;
  return {rows.index ? rows.index + begin : nullptr, rows.first + begin, count};
}

#if defined(FASTOK_AMX)
struct Tiles {
  Tiles() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};
#else
struct Tiles {};
#endif

template <class T>
void write_row(const float* x, float factor, int64_t width, T* out) {
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) store(out + c, load(x + c) * splat(factor));
  for (; c < width; ++c) narrow(x[c] * factor, out[c]);
}

void write_row(const float* x, float factor, int64_t width, Dtype dtype, void* out, int64_t at) {
  switch (dtype) {
    case Dtype::f16:
      return write_row(x, factor, width, static_cast<f16*>(out) + at);
    case Dtype::bf16:
      return write_row(x, factor, width, static_cast<bf16*>(out) + at);
    default:
      return write_row(x, factor, width, static_cast<float*>(out) + at);
  }
}

template <class E>
void forward(const AttentionHead& head, const void* keys, const void* values, int64_t key_begin, int64_t key_end,
             const RowList& all_rows, void* out, int64_t out_stride, bool wide, float* lse, void* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Scratch<E> scratch(memory, head.q.width);
  auto* const weights = E::weights(scratch.scores, scratch.weights);
  const int64_t width = head.q.width, v_width = E::padded(head.v.width);
  const int64_t n_packed = round_up(key_end - key_begin, E::kStep);
  for (int64_t done = 0; done < all_rows.count; done += E::kRows) {
    const RowList rows = part_of(all_rows, done, E::kRows);
    const int64_t n_rows = round_up(rows.count, E::kTileRows);
    E::pack_rows(head, rows, scratch.rows);
    Running running;
    int64_t first = key_end, last = key_begin;
    for (int64_t i = 0; i < rows.count; ++i) {
      running.peak[i] = -kInfinity;
      running.total[i] = 0;
      const int64_t from = head.first_key(rows.at(i)), to = head.last_key(rows.at(i));
      first = from < first ? from : first;
      last = to > last ? to : last;
    }
    first = first > key_begin ? key_begin + (first - key_begin) / E::kKeys * E::kKeys : key_begin;
    last = last < key_end ? last : key_end;
    std::memset(scratch.out, 0, size_t(n_rows * v_width) * sizeof(float));

    for (int64_t begin = first; begin < last; begin += E::kKeys) {
      const int64_t end = begin + E::kKeys < key_end ? begin + E::kKeys : key_end;
      const int64_t n = round_up(end - begin, E::kStep);
      E::multiply(scratch.rows, n_rows, keys, begin - key_begin, n, width, scratch.scores, E::kKeys);
      for (int64_t i = 0; i < rows.count; ++i) {
        float* const x = scratch.scores + i * E::kKeys;
        const float factor = finish_logits<E>(head, rows.at(i), begin, end, n, x);
        const float before = running.peak[i], here = peak_of(x, n) * factor;
        const float peak = here > before ? here : before;
        // A row that has seen nothing yet: its NaN, if any, must show.
        const float shift = peak == -kInfinity ? 0.0f : peak;
        const float shrink = before == -kInfinity ? 0.0f : __builtin_expf(before - shift);
        running.total[i] = running.total[i] * shrink + exponentials(x, n, factor, shift, weights + i * E::kKeys);
        running.peak[i] = peak;
        if (shrink != 1.0f && begin > first) {
          float* const o = scratch.out + i * v_width;
          for (int64_t c = 0; c < v_width; c += kLanes) store(o + c, load(o + c) * splat(shrink));
        }
      }
      if (v_width > 0) E::add_values(weights, n_rows, values, n_packed, begin - key_begin, n, v_width, scratch.out);
    }

    for (int64_t i = 0; i < rows.count; ++i) {
      const float total = running.total[i];
      lse[done + i] = total == 0 ? -kInfinity : running.peak[i] + __builtin_logf(total);
      if (v_width > 0)
        write_row(scratch.out + i * v_width, total == 0 ? 0.0f : 1.0f / total, head.v.width,
                  wide ? Dtype::f32 : head.dtype, out, (done + i) * out_stride);
    }
  }
}

// From logits to what is asked for, in place.
void finish_scores(float* x, int64_t n, float factor, const float* lse) {
  if (!lse) {
    for (int64_t j = 0; j < n && factor != 1.0f; j += kLanes) store(x + j, load(x + j) * splat(factor));
  } else if (*lse == -kInfinity) {
    std::memset(x, 0, size_t(n) * sizeof(float));
  } else {
    exponentials(x, n, factor, *lse, x);
  }
}

template <class E>
void scores(const AttentionHead& head, const void* keys, int64_t key_begin, int64_t key_end, const RowList& rows,
            const float* lse, float* out, int64_t pitch, void* memory) {
  [[maybe_unused]] const Tiles tiles;
  const Scratch<E> scratch(memory, head.q.width);
  const int64_t n = round_up(key_end - key_begin, E::kStep);
  E::pack_rows(head, rows, scratch.rows);
  E::multiply(scratch.rows, round_up(rows.count, E::kTileRows), keys, 0, n, head.q.width, out, pitch);
  for (int64_t i = 0; i < rows.count; ++i) {
    float* const x = out + i * pitch;
    const float factor = finish_logits<E>(head, rows.at(i), key_begin, key_end, n, x);
    finish_scores(x, n, factor, lse ? lse + i : nullptr);
  }
}

template <class T>
void dot_products(const float* q, const T* k, int64_t stride, int64_t n_keys, int64_t width, float* out) {
  for (int64_t j = 0; j < n_keys; ++j, k += stride) {
    if (j + kAhead < n_keys)
      for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(k + kAhead * stride + d);
    vf sum = splat(0.0f);
    int64_t d = 0;
    for (; d + kLanes <= width; d += kLanes) sum = fma(load(q + d), load(k + d), sum);
    float total = horizontal_sum(sum);
    for (; d < width; ++d) total += q[d] * widen(k[d]);
    out[j] = total;
  }
}

void few_scores(const AttentionHead& head, int64_t key_begin, int64_t key_end, const RowList& rows, const float* lse,
                float* out, int64_t pitch) {
  const int64_t n = key_end - key_begin, at = key_begin * head.k.stride;
  for (int64_t i = 0; i < rows.count; ++i) {
    float q[256];
    widen_row(head.q, head.dtype, rows.at(i), head.scale, q);
    float* const x = out + i * pitch;
    std::memset(x + n, 0, size_t(pitch - n) * sizeof(float));
    switch (head.dtype) {
      case Dtype::f16:
        dot_products(q, static_cast<const f16*>(head.k.data) + at, head.k.stride, n, head.k.width, x);
        break;
      case Dtype::bf16:
        dot_products(q, static_cast<const bf16*>(head.k.data) + at, head.k.stride, n, head.k.width, x);
        break;
      default:
        dot_products(q, static_cast<const float*>(head.k.data) + at, head.k.stride, n, head.k.width, x);
    }
    const float factor = finish_logits<Fp32>(head, rows.at(i), key_begin, key_end, pitch, x);
    finish_scores(x, pitch, factor, lse ? lse + i : nullptr);
  }
}

template <class E>
constexpr AttentionEngine engine_of() {
  return {E::kRows,     E::kStep,       E::key_bytes, E::value_bytes, Scratch<E>::bytes,
          E::pack_keys, E::pack_values, forward<E>,   scores<E>};
}

// ---- reductions
// -------------------------------------------------------------------------------------------------------

void fold_rows(const float* block, int64_t rows, int64_t pitch, int64_t keys, bool max, float* total) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    vf sum = load(total + j);
    for (int64_t i = 0; i < rows; ++i) {
      const vf x = load(block + i * pitch + j);
      const vmask counts = either(greater(x, max ? sum : splat(-kInfinity)), unordered(x));
      sum = max ? select(counts, x, sum) : sum + select(counts, x, splat(0.0f));
    }
    store(total + j, sum);
  }
}

void fold_blocks(const float* block, int64_t rows, int64_t pitch, int64_t keys, const float* weight, bool first,
                 bool max, float* total) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < keys; j += kLanes) {
      vf x = load(block + i * pitch + j);
      if (weight) x = select(greater(x, splat(-kInfinity)), x * load(weight + j), x);
      const vf before = load(total + i * pitch + j);
      store(total + i * pitch + j, first ? x
                                   : max ? select(either(greater(x, before), unordered(x)), x, before)
                                         : before + x);
    }
  }
}

void merge_parts(const float* part, int64_t part_stride, const float* part_lse, int64_t lse_stride, int64_t parts,
                 int64_t width, Dtype dtype, void* out, float* lse) {
  float peak = -kInfinity, total = 0;
  for (int64_t s = 0; s < parts; ++s) {
    const float x = part_lse[s * lse_stride];
    peak = x > peak || x != x ? x : peak;
  }
  float sum[256] = {};
  for (int64_t s = 0; s < parts && peak != -kInfinity; ++s) {
    const float weight = __builtin_expf(part_lse[s * lse_stride] - peak);
    total += weight;
    for (int64_t c = 0; c < width; ++c) sum[c] += weight * part[s * part_stride + c];
  }
  *lse = peak == -kInfinity ? peak : peak + __builtin_logf(total);
  write_row(sum, peak == -kInfinity ? 0.0f : 1.0f / total, width, dtype, out, 0);
}

constexpr AttentionEngine kFp32 = engine_of<Fp32>();
#if defined(FASTOK_AMX)
constexpr AttentionEngine kBf16 = engine_of<Bf16>();
#endif

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {few_scores, kFp32,
#if defined(FASTOK_AMX)
                                            &kBf16,
#else
                                            nullptr,
#endif
                                            fold_rows,  fold_blocks, merge_parts};

}  // namespace fastok::FASTOK_ISA
