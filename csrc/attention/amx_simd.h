// Attention's bf16 engine, on AMX tiles: packing, and the two products of a block of rows with a block of keys.
#pragma once
#include <utility>

#include "attention/bf16_simd.h"
#include "cpu/amx_simd.h"

#if defined(FASTOK_AMX)

namespace fastok::FASTOK_ISA {
namespace {

template <int kBlocks>
class Background;

struct Bf16 {
  static constexpr int kTile = 16, kDepth = 32, kStep = 32, kBlock = kTile * kDepth;
  static constexpr int kTileRows = kTile;  // two tiles of rows at a time, as long as there are two
  static constexpr int kRows = 64, kRowsTogether = 32, kKeys = 128;
  static_assert(kRows % kTileRows == 0 && kKeys % kStep == 0);
  static constexpr bool kBackground = true;
  template <int kBlocks>
  using InBackground = Background<kBlocks>;
  static constexpr bool kScaledRows = false;
  using Weight = bf16;
  static constexpr int kWeightPitch = 2 * kKeys;

  static int64_t padded(int64_t width) { return round_up(width, 32); }
  static size_t row_bytes(int64_t width) { return size_t(kRows * padded(width)) * sizeof(bf16); }
  static size_t key_bytes(int64_t n, int64_t width) {
    return size_t(round_up(n, kStep) * padded(width)) * sizeof(bf16);
  }
  static size_t value_bytes(int64_t n, int64_t width) { return key_bytes(n, width); }

  // [row][padded width], zeros up to the next pair of tiles
  static void pack_rows(const AttentionHead& head, const RowList& rows, void* out_bytes) {
    bf16* const out = static_cast<bf16*>(out_bytes);
    const int64_t width = head.q.width, pitch = padded(width);
    for (int64_t i = 0; i < round_up(rows.count, 2 * kTile); ++i) {
      bf16* const row = out + i * pitch;
      if (i + kAhead < rows.count) prefetch_row(head.q, rows.at(i + kAhead));
      const bf16* const from =
          static_cast<const bf16*>(head.q.data) + (i < rows.count ? rows.at(i) : 0) * head.q.stride;
      for (int64_t d = 0; d < pitch; d += kDepth) {
        const __mmask32 wanted = i < rows.count ? first_lanes(width - d) : 0;
        _mm512_storeu_si512(row + d, _mm512_maskz_loadu_epi16(wanted, from + d));
      }
    }
  }
  // [16 keys][depth block][pair of depths][key][2]
  static void pack_keys(const HeadRows& k, Dtype, int64_t begin, int64_t end, void* out) {
    const int64_t words = padded(k.width) / 2;
    for (int64_t j = 0; j < round_up(end - begin, kStep); j += kTile)
      transpose_pairs<kTile>(k, begin + j, end, words, static_cast<float*>(out) + j * words);
  }
  // [32 keys][16 channels][pair of keys][channel][2]
  static void pack_values(const HeadRows& v, Dtype, int64_t begin, int64_t end, void* out) {
    const int64_t channels = padded(v.width);
    for (int64_t key = 0; key < round_up(end - begin, kStep); key += 2) {
      prefetch_row(v, begin + key + kAhead);
      prefetch_row(v, begin + key + kAhead + 1);
      int32_t* const at = static_cast<int32_t*>(out) + (key / kDepth * channels * kDepth + key % kDepth * kTile) / 2;
      for (int64_t c = 0; c < channels; c += kTile)
        store(at + c / kTile * (kBlock / 2), pair_values(v, begin + key, end, c));
    }
  }

  static void multiply(const void* rows, int64_t n_rows, const void* keys, int64_t key, int64_t n_keys, int64_t width,
                       float* out, int64_t pitch) {
    const int64_t depth = padded(width), blocks = depth / kDepth;
    const size_t row_pitch = size_t(depth) * sizeof(bf16);
    for (int64_t j = 0; j < n_keys; j += kStep) {
      const bf16* const b0 = static_cast<const bf16*>(keys) + (key + j) / kTile * blocks * kBlock;
      const bf16* const b1 = b0 + blocks * kBlock;
      for (int64_t i = 0; i < n_rows; i += 2 * kTile) {
        const bf16* const a = static_cast<const bf16*>(rows) + i * depth;
        float* const to = out + i * pitch + j;
        if (i + kTile < n_rows)
          multiply_tiles<true>(a, row_pitch, b0, b1, blocks, to, pitch);
        else
          multiply_tiles<false>(a, row_pitch, b0, b1, blocks, to, pitch);
      }
    }
  }
  // Of one or two tiles of rows with two of keys.
  template <bool kTwo>
  static void multiply_tiles(const bf16* a, size_t row_pitch, const bf16* b0, const bf16* b1, int64_t blocks,
                             float* out, int64_t pitch) {
    const bf16* const a1 = a + kTile * blocks * kDepth;
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t block = 0; block < blocks; ++block) {
      _tile_loadd(4, a + block * kDepth, row_pitch);
      _tile_loadd(6, b0 + block * kBlock, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b1 + block * kBlock, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwo) {
        _tile_loadd(5, a1 + block * kDepth, row_pitch);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    store_tiles<kTwo>(out, pitch);
  }
  template <bool kTwo>
  static void store_tiles(float* out, int64_t pitch) {
    const size_t bytes = size_t(pitch) * sizeof(float);
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + kTile, bytes);
    if constexpr (kTwo) {
      _tile_stored(2, out + kTile * pitch, bytes);
      _tile_stored(3, out + kTile * pitch + kTile, bytes);
    }
  }

  // out[i][c] += the sum over `depth` of a[i][j] * b[j][c]; b is [32 summands][b_width / 16][pair][16 columns][2].
  static void add_product(const bf16* a, int64_t a_pitch, int64_t n_rows, const bf16* b, int64_t b_width, int64_t depth,
                          int64_t n_columns, float* out, int64_t pitch) {
    for (int64_t c = 0; c < n_columns; c += 2 * kTile) {
      for (int64_t i = 0; i < n_rows; i += 2 * kTile) {
        const bf16* const from = a + i * a_pitch;
        const bf16* const by = b + c / kTile * kBlock;
        float* const to = out + i * pitch + c;
        if (i + kTile < n_rows)
          add_tiles<true>(from, a_pitch, by, b_width, depth, to, pitch);
        else
          add_tiles<false>(from, a_pitch, by, b_width, depth, to, pitch);
      }
    }
  }
  template <bool kTwo>
  static void add_tiles(const bf16* a, int64_t a_pitch, const bf16* b, int64_t b_width, int64_t depth, float* out,
                        int64_t pitch) {
    const size_t a_bytes = size_t(a_pitch) * sizeof(bf16), out_bytes = size_t(pitch) * sizeof(float);
    const bf16* const a1 = a + kTile * a_pitch;
    _tile_loadd(0, out, out_bytes);
    _tile_loadd(1, out + kTile, out_bytes);
    if constexpr (kTwo) {
      _tile_loadd(2, out + kTile * pitch, out_bytes);
      _tile_loadd(3, out + kTile * pitch + kTile, out_bytes);
    }
    for (int64_t j = 0; j < depth; j += kDepth, b += b_width / kTile * kBlock) {
      _tile_loadd(4, a + j, a_bytes);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + kBlock, 64);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTwo) {
        _tile_loadd(5, a1 + j, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    store_tiles<kTwo>(out, pitch);
  }
  static void add_values(const bf16* weight, int64_t n_rows, const void* values, int64_t key, int64_t n_keys,
                         int64_t width, float* out) {
    add_product(weight, kWeightPitch, n_rows, static_cast<const bf16*>(values) + key * width, width, n_keys, width, out,
                width);
  }
};

// Tiles compute in the background of vector instructions, if these are mingled with them: what has to wait in one go
// stops those behind it. So the products of 32 rows with the next keys, and the sums of the values of earlier ones, are
// made in small steps, to be called in ascending order between other work.
template <int kBlocks>  // of 32 channels, in keys and in values
class Background {
 public:
  static constexpr int kRows = Bf16::kRowsTogether;
  static constexpr int kKeys = Bf16::kStep;       // whose products a round of steps makes
  static constexpr int kDepth = 4 * kKeys;        // keys whose values are summed up in 4 rounds or more
  static constexpr int kWeights = kRows * kKeys;  // of one step: [row][key]
  static constexpr int kSteps = 2 * (3 * kBlocks + 2) + 5 * kBlocks;

  explicit Background(float* out) : out_(out) {}

  // Before a round that multiplies: the rows and keys whose products go to scores[32][kKeys].
  void next_products(const void* rows, const void* keys, float* scores) {
    rows_ = static_cast<const bf16*>(rows), keys_ = static_cast<const bf16*>(keys), scores_ = scores;
  }
  // Sums up the values of `n` keys, in whole steps of Bf16, by weights[n / 32][row][32], and adds what is in `out`.
  void next_values(const bf16* weights, const bf16* values, int64_t n, bool adds) {
    weights_ = weight_ = weights, values_ = value_ = values, n_ = left_ = n / kKeys, to_ = out_;
    adds_ = adds;
  }
  bool sums() const { return left_ > 0; }
  void finish_values() {
    while (sums()) value_steps(std::make_integer_sequence<int, kValueSteps>());
  }
  template <bool kMultiplies, bool kSums, int kAt>
  inline __attribute__((always_inline)) void step() {
    constexpr int kOwn = kAt < kFirst ? kAt : kAt - kFirst, kColumn = kAt >= kFirst;
    constexpr int kValues = kColumn == 0 ? (kBlocks + 1) / 2 : kBlocks / 2;
    if constexpr (kOwn < kKeySteps) {
      if constexpr (kMultiplies) key_step<kColumn, kOwn>();
    } else if constexpr (kOwn < kKeySteps + kValueSteps * kValues) {
      if constexpr (kSums) value_step<(kOwn - kKeySteps) % kValueSteps>();
    } else {
      if constexpr (kMultiplies) store_products<kColumn, kOwn - kKeySteps - kValueSteps * kValues>();
    }
  }

 private:
  static constexpr int kTile = Bf16::kTile, kBlock = Bf16::kBlock, kWidth = kBlocks * Bf16::kDepth;
  static constexpr int kKeySteps = 3 * kBlocks, kValueSteps = 5;
  static constexpr int kFirst = kKeySteps + kValueSteps * ((kBlocks + 1) / 2) + 2;  // steps of the first 16 keys
  static constexpr size_t kRowBytes = kWidth * sizeof(bf16), kOutBytes = kWidth * sizeof(float),
                          kScoreBytes = kKeys * sizeof(float);
  static_assert(kRows == 2 * kTile);

  // Of 16 keys, tile registers 4 and 5: one for either half of the rows.
  template <int kColumn, int kAt>
  inline __attribute__((always_inline)) void key_step() {
    constexpr int kOf = kAt / 3;
    const bf16* const row = rows_ + kOf * Bf16::kDepth;
    if constexpr (kAt % 3 == 0) {
      _tile_stream_loadd(7, keys_ + (kColumn * kBlocks + kOf) * kBlock, 64);
      _tile_loadd(6, row, kRowBytes);
    } else if constexpr (kAt % 3 == 1) {
      if constexpr (kOf == 0) _tile_zero(4);
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(6, row + kTile * kWidth, kRowBytes);
    } else {
      if constexpr (kOf == 0) _tile_zero(5);
      _tile_dpbf16ps(5, 6, 7);
    }
  }
  template <int kColumn, int kHalf>
  inline __attribute__((always_inline)) void store_products() {
    float* const to = scores_ + kHalf * kTile * kKeys + kColumn * kTile;
    if constexpr (kHalf == 0)
      _tile_stored(4, to, kScoreBytes);
    else
      _tile_stored(5, to, kScoreBytes);
  }
  // Of 32 keys, and 32 channels in tile registers 0 to 3: [half of the rows][half of the channels].
  template <int kAt>
  inline __attribute__((always_inline)) void value_step() {
    if constexpr (kAt == 0) {
      if (left_ == n_ && !adds_) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      } else if (left_ == n_) {
        _tile_loadd(0, to_, kOutBytes);
        _tile_loadd(1, to_ + kTile, kOutBytes);
        _tile_loadd(2, to_ + kTile * kWidth, kOutBytes);
        _tile_loadd(3, to_ + kTile * kWidth + kTile, kOutBytes);
      }
      _tile_loadd(6, weight_, 64);
      _tile_stream_loadd(7, value_, 64);
    } else if constexpr (kAt == 1) {
      _tile_dpbf16ps(0, 6, 7);
      _tile_loadd(6, weight_ + kWeights / 2, 64);
    } else if constexpr (kAt == 2) {
      _tile_dpbf16ps(2, 6, 7);
      _tile_stream_loadd(7, value_ + kBlock, 64);
    } else if constexpr (kAt == 3) {
      _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(6, weight_, 64);
    } else {
      _tile_dpbf16ps(1, 6, 7);
      weight_ += kWeights;
      value_ += kKeys * kWidth;
      if (--left_ > 0) return;
      _tile_stored(0, to_, kOutBytes);
      _tile_stored(1, to_ + kTile, kOutBytes);
      _tile_stored(2, to_ + kTile * kWidth, kOutBytes);
      _tile_stored(3, to_ + kTile * kWidth + kTile, kOutBytes);
      to_ += 2 * kTile;
      weight_ = weights_;
      values_ += 2 * kBlock;
      value_ = values_;
      if (to_ < out_ + kWidth) left_ = n_;
    }
  }
  template <int... kAt>
  void value_steps(std::integer_sequence<int, kAt...>) {
    (value_step<kAt>(), ...);
  }

  float* out_;
  const bf16 *rows_ = nullptr, *keys_ = nullptr;
  float* scores_ = nullptr;
  // Of the values of n_ steps: the first one's, and the next one's of those left of this column.
  const bf16 *weights_ = nullptr, *values_ = nullptr, *weight_ = nullptr, *value_ = nullptr;
  float* to_ = nullptr;
  int64_t n_ = 0, left_ = 0;
  bool adds_ = false;
};

}  // namespace
}  // namespace fastok::FASTOK_ISA

#else

namespace fastok::FASTOK_ISA {
namespace {

struct Tiles {
  static void stay_awake() {}
};

}  // namespace
}  // namespace fastok::FASTOK_ISA

#endif
