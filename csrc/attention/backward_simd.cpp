// The gradient of attention, a block of keys against a block of query rows at a time. Blocks hold the transposed
// matrix, a row per key: what is known of a query (its log-sum-exp, its delta) lies in vectors then, and P and dS are
// just the factors that the keys' and values' gradients want.
//   S = Q K^T   P = exp(S - lse)   dV = P^T dO   dP = dO V^T   dS = P (dP - delta)   dQ = dS K   dK = dS^T Q
#include "attention/backward.h"

#include "attention/amx_simd.h"
#include "attention/exp_simd.h"
#include "attention/fp32_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// ---- the two engines ------------------------------------------------------------------------------------------------

struct Fp32Gradient : Fp32 {
  static constexpr int kRowBlock = 192, kKeyBlock = 96;
  static_assert(kRowBlock % kStep == 0 && kKeyBlock % kTileRows == 0);
#if defined(__AVX512F__)
  static constexpr int kQueryRows = 8;
#else
  static constexpr int kQueryRows = 4;
#endif
  static_assert(kStep % kQueryRows == 0);

  // P and dS of a block, [key][row]. Tiles are computed in their places.
  struct Block {
    float *p, *ds;
    static size_t bytes() { return 2 * kKeyBlock * kRowBlock * sizeof(float); }
    explicit Block(char* memory) : p(reinterpret_cast<float*>(memory)), ds(p + kKeyBlock * kRowBlock) {}
    static constexpr int64_t kPitch = kRowBlock;
    float* scores(int64_t key, int64_t row) const { return p + key * kPitch + row; }
    float* products(int64_t key, int64_t row) const { return ds + key * kPitch + row; }
    void keep_tile(int64_t, int64_t) const {}
  };

  static size_t tile_key_bytes(int64_t width) { return size_t(kKeyBlock * width) * sizeof(float); }
  static const float* tile_of(const void* tiles, int64_t key, int64_t width) {
    return static_cast<const float*>(tiles) + key * width;
  }
  // For the gradient of the queries.
  static size_t turned_key_bytes(int64_t width) { return size_t(kKeyBlock * padded(width)) * sizeof(float); }
  static void turn_keys(const HeadRows& k, Dtype dtype, int64_t begin, int64_t end, void* out) {
    pack_values(k, dtype, begin, end, out);
  }

  // out[i][c] += the sum over `depth` of a[i * kAcross + j * kAlong] * b[j][c], for kCount rows and a tile's columns.
  // Not more than kSummands at once: under a causal mask the first keys' sums soon are large, and each addition rounds
  // them.
  static constexpr int64_t kSummands = 64;
  template <int kCount, int kAcross, int kAlong>
  static void add_tile(const float* a, const float* b, int64_t depth, int64_t width, float* out) {
    vf acc[kCount][2];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) acc[i][0] = acc[i][1] = splat(0.0f);
    for (int64_t j = 0; j < depth; ++j) {
      const vf b0 = load(b + j * width), b1 = load(b + j * width + kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) {
        const vf x = splat(a[i * kAcross + j * kAlong]);
        acc[i][0] = fma(x, b0, acc[i][0]);
        acc[i][1] = fma(x, b1, acc[i][1]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      store(out + i * width, load(out + i * width) + acc[i][0]);
      store(out + i * width + kLanes, load(out + i * width + kLanes) + acc[i][1]);
    }
  }
  // sums[key][channel] += block[key][row] * rows[row][channel] of the packed rows [row, row + n_rows), which are at
  // `column` of the block.
  static void add_to_keys(const float* block, int64_t n_keys, int64_t column, const void* rows, int64_t row,
                          int64_t n_rows, int64_t width, float* sums) {
    const int64_t pitch = padded(width);
    const float* const b = static_cast<const float*>(rows) + row * pitch;
    for (int64_t c = 0; c < pitch; c += kStep)
      for (int64_t i = 0; i < n_keys; i += kTileRows)
        for (int64_t j = 0; j < n_rows; j += kSummands)
          add_tile<kTileRows, kRowBlock, 1>(block + i * kRowBlock + column + j, b + j * pitch + c,
                                            n_rows - j < kSummands ? n_rows - j : kSummands, pitch,
                                            sums + i * pitch + c);
  }
  // d_q[row][channel] += dS[key][row] * keys[key][channel].
  static void add_to_queries(const Block& block, int64_t n_keys, int64_t column, const void* keys, int64_t row,
                             int64_t n_rows, int64_t width, float* d_q) {
    const int64_t pitch = padded(width);
    for (int64_t c = 0; c < pitch; c += kStep)
      for (int64_t i = 0; i < n_rows; i += kQueryRows)
        add_tile<kQueryRows, 1, kRowBlock>(block.ds + column + i, static_cast<const float*>(keys) + c, n_keys, pitch,
                                           d_q + (row + i) * pitch + c);
  }
  static void write_queries(const float* d_q, int64_t n_rows, int64_t width, float factor, Dtype dtype, void* out,
                            int64_t stride) {
    for (int64_t i = 0; i < n_rows; ++i) write_row(d_q + i * padded(width), factor, width, dtype, out, i * stride);
  }
};

#if defined(FASTOK_AMX)
struct Bf16Gradient : Bf16 {
  static constexpr int kRowBlock = 320, kKeyBlock = 192, kTileRows = 2 * kTile;

  // P and dS of a block, rounded: [key][row], and dS once more in pairs of keys, as the factor on the right:
  // [32 keys][16 rows][pair of keys][row][2].
  struct Block {
    bf16 *p, *ds, *ds_pairs;
    float* tile;  // S, then P, and dP, then dS: [32][32] each
    static constexpr int64_t kPitch = kStep;
    static size_t bytes() { return 3 * kKeyBlock * kRowBlock * sizeof(bf16) + 2 * kTileRows * kStep * sizeof(float); }
    explicit Block(char* memory)
        : p(reinterpret_cast<bf16*>(memory)),
          ds(p + kKeyBlock * kRowBlock),
          ds_pairs(ds + kKeyBlock * kRowBlock),
          tile(reinterpret_cast<float*>(ds_pairs + kKeyBlock * kRowBlock)) {}
    float* scores(int64_t, int64_t) const { return tile; }
    float* products(int64_t, int64_t) const { return tile + kTileRows * kStep; }
    void keep_tile(int64_t key, int64_t row) const {
      const __m512i side_by_side = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                                    22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
      bf16* const pairs = ds_pairs + (key / kDepth * (kRowBlock / kTile) + row / kTile) * kBlock;
      for (int i = 0; i < kTileRows; i += 2) {
        const float* const x = tile + i * kStep;
        const float* const y = products(key, row) + i * kStep;
        const int64_t at = (key + i) * kRowBlock + row;
        keep(p + at, _mm512_cvtne2ps_pbh(load(x + kLanes), load(x)));
        keep(p + at + kRowBlock, _mm512_cvtne2ps_pbh(load(x + kStep + kLanes), load(x + kStep)));
        const vf y0 = load(y), y1 = load(y + kLanes), z0 = load(y + kStep), z1 = load(y + kStep + kLanes);
        keep(ds + at, _mm512_cvtne2ps_pbh(y1, y0));
        keep(ds + at + kRowBlock, _mm512_cvtne2ps_pbh(z1, z0));
        bf16* const to = pairs + i * kTile;
        keep(to, _mm512_permutexvar_epi16(side_by_side, __m512i(_mm512_cvtne2ps_pbh(z0, y0))));
        keep(to + kBlock, _mm512_permutexvar_epi16(side_by_side, __m512i(_mm512_cvtne2ps_pbh(z1, y1))));
      }
    }
    template <class V>
    static void keep(bf16* to, V x) {
      std::memcpy(to, &x, sizeof x);
    }
  };

  static size_t tile_key_bytes(int64_t width) { return size_t(kKeyBlock * padded(width)) * sizeof(bf16); }
  static const bf16* tile_of(const void* tiles, int64_t key, int64_t width) {
    return static_cast<const bf16*>(tiles) + key * padded(width);
  }
  // [padded width][kKeyBlock]
  static size_t turned_key_bytes(int64_t width) { return tile_key_bytes(width); }
  static void turn_keys(const HeadRows& k, Dtype, int64_t begin, int64_t end, void* out_bytes) {
    bf16* const out = static_cast<bf16*>(out_bytes);
    const bf16* const data = static_cast<const bf16*>(k.data);
    float row[256] = {};
    for (int64_t j = 0; j < round_up(end - begin, kStep); j += kLanes) {
      for (int64_t d = 0; d < padded(k.width); d += kLanes) {
        vf r[16];
        for (int i = 0; i < 16; ++i) {
          const bool inside = begin + j + i < end;
          if (inside && d + kLanes <= k.width) {
            r[i] = load(data + (begin + j + i) * k.stride + d);
          } else {
            for (int c = 0; c < kLanes; ++c)
              row[c] = inside && d + c < k.width ? widen(data[(begin + j + i) * k.stride + d + c]) : 0.0f;
            r[i] = load(row);
          }
        }
        transpose(r);
        for (int i = 0; i < 16; ++i) store(out + (d + i) * kKeyBlock + j, r[i]);
      }
    }
  }

  static void add_to_keys(const bf16* block, int64_t n_keys, int64_t column, const void* rows, int64_t row,
                          int64_t n_rows, int64_t width, float* sums) {
    add_product(block + column, kRowBlock, n_keys, static_cast<const bf16*>(rows) + row * padded(width), padded(width),
                n_rows, padded(width), sums, padded(width));
  }
  // d_q is turned: [row / kRowBlock][padded width][kRowBlock].
  static void add_to_queries(const Block& block, int64_t n_keys, int64_t column, const void* keys, int64_t row,
                             int64_t n_rows, int64_t width, float* d_q) {
    add_product(static_cast<const bf16*>(keys), kKeyBlock, padded(width), block.ds_pairs + column * kDepth, kRowBlock,
                round_up(n_keys, kDepth), n_rows, d_q + row / kRowBlock * kRowBlock * padded(width) + row % kRowBlock,
                kRowBlock);
  }
  static void write_queries(const float* d_q, int64_t n_rows, int64_t width, float factor, Dtype dtype, void* out,
                            int64_t stride) {
    float rows[kLanes][256];
    for (int64_t i = 0; i < n_rows; i += kLanes) {
      const float* const from = d_q + i / kRowBlock * kRowBlock * padded(width) + i % kRowBlock;
      for (int64_t d = 0; d < padded(width); d += kLanes) {
        vf r[16];
        for (int c = 0; c < 16; ++c) r[c] = load(from + (d + c) * kRowBlock);
        transpose(r);
        for (int c = 0; c < 16; ++c) store(rows[c] + d, r[c]);
      }
      for (int c = 0; c < kLanes && i + c < n_rows; ++c)
        write_row(rows[c], factor, width, dtype, out, (i + c) * stride);
    }
  }
};
#endif

// ---- a tile ---------------------------------------------------------------------------------------------------------

alignas(64) constexpr float kPlace[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                          16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// What a tile needs to know of its rows, of which `minus_lse` is to base 2: -inf where nothing is to come out.
struct TileRows {
  int64_t first;  // in the sequence
  const float *minus_lse, *delta;
};

// S to P and dP to dS, in place, of one key: kStep rows. With kPlain every row sees the key, and there is no softcap
// and no bias.
template <class E, bool kPlain>
inline __attribute__((always_inline)) void differentiate(const AttentionHead& head, int64_t key, int64_t key_end,
                                                         const TileRows& rows, float* s, float* dp, float* d_bias) {
  const float factor = E::kScaledRows ? 1.0f : head.scale, cap = head.softcap;
  // The rows that see the key, counted from the tile's first.
  float low = 0, high = 0, bias = 0;
  if (!kPlain && key < key_end) {
    const int64_t diagonal = key - (head.k.count - head.q.count) - rows.first;
    const int64_t first = head.right < 0 ? 0 : diagonal - head.right;
    const int64_t last = head.left < 0 ? E::kStep : diagonal + head.left + 1;
    low = float(first < 0 ? 0 : first < E::kStep ? first : E::kStep);
    high = float(last < 0 ? 0 : last < E::kStep ? last : E::kStep);
    bias = head.bias ? head.bias[key] : 0.0f;
  }
  vf sum = splat(0.0f);
#pragma GCC unroll 2
  for (int i = 0; i < E::kStep; i += kLanes) {
    const vf minus_lse = load(rows.minus_lse + i), delta = load(rows.delta + i);
    vf x = load(s + i), slope = splat(1.0f);
    if constexpr (kPlain) {
      x = fma(x, splat(factor * kLog2E), minus_lse);
    } else {
      x = x * splat(cap > 0 ? factor / cap : factor);
      if (cap > 0) {
        x = tanh_of(x);
        slope = splat(1.0f) - x * x;
        x = x * splat(cap);
      }
      x = fma(x + splat(bias), splat(kLog2E), minus_lse);
    }
    vf p = exp2_of(x), ds = p * (load(dp + i) - delta);
    if constexpr (!kPlain) {
      const vf zero = splat(0.0f), count = load(kPlace + i);
      const vmask early = greater(splat(low), count), seen = greater(splat(high), count);
      p = select(early, zero, select(seen, p, zero));
      ds = select(early, zero, select(seen, ds, zero));
      sum = sum + ds;
      ds = ds * slope;
    }
    store(s + i, p);
    store(dp + i, ds);
  }
  if (!kPlain && d_bias && key < key_end) d_bias[key] += horizontal_sum(sum);
}

// ---- a head ---------------------------------------------------------------------------------------------------------

template <class E>
struct GradientScratch {
  void *q_columns, *d_out_columns, *q_rows, *d_out_rows, *key_tiles, *value_tiles, *turned_keys;
  float *minus_lse, *delta, *d_q;
  char* block;

  static size_t bytes(int64_t n_rows, int64_t width, int64_t v_width) {
    return GradientScratch(nullptr, n_rows, width, v_width).bytes_;
  }
  GradientScratch(void* memory, int64_t n_rows, int64_t width, int64_t v_width) : memory_(static_cast<char*>(memory)) {
    const int64_t padded_rows = round_up(n_rows, E::kRowBlock);
    q_columns = take(E::key_bytes(n_rows, width));
    d_out_columns = take(E::key_bytes(n_rows, v_width));
    q_rows = take(E::value_bytes(n_rows, width));
    d_out_rows = take(E::value_bytes(n_rows, v_width));
    key_tiles = take(E::tile_key_bytes(width));
    value_tiles = take(E::tile_key_bytes(v_width));
    turned_keys = take(E::turned_key_bytes(width));
    minus_lse = static_cast<float*>(take(size_t(padded_rows) * sizeof(float)));
    delta = static_cast<float*>(take(size_t(padded_rows) * sizeof(float)));
    d_q = static_cast<float*>(take(d_q_bytes(n_rows, width)));
    block = static_cast<char*>(take(E::Block::bytes()));
  }
  static size_t d_q_bytes(int64_t n_rows, int64_t width) {
    return size_t(round_up(n_rows, E::kRowBlock) * E::padded(width)) * sizeof(float);
  }

 private:
  void* take(size_t bytes) {
    void* const at = memory_ + bytes_;
    bytes_ += (bytes + 63) / 64 * 64;
    return at;
  }
  char* memory_;
  size_t bytes_ = 0;
};

float dot(const float* x, const float* y, int64_t width) {
  vf sum = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) sum = fma(load(x + d), load(y + d), sum);
  float total = horizontal_sum(sum);
  for (; d < width; ++d) total += x[d] * y[d];
  return total;
}

// Of rows [begin, end), padded with rows of which nothing comes out.
void note_rows(const AttentionResults& results, Dtype dtype, int64_t begin, int64_t end, int64_t padded,
               float* minus_lse, float* delta) {
  float out[256], d_out[256];
  for (int64_t i = 0; i < padded; ++i) {
    minus_lse[i] = -kInfinity;
    delta[i] = 0;
    if (begin + i >= end) continue;
    prefetch_row(results.out, begin + i + kAhead);
    const float lse = results.lse[begin + i];
    widen_row(results.out, dtype, begin + i, 1.0f, out);
    widen_row(results.d_out, dtype, begin + i, 1.0f, d_out);
    delta[i] = dot(out, d_out, results.out.width);
    // The log-sum-exp of a row that sees nothing is a constant.
    if (lse == -kInfinity) continue;
    minus_lse[i] = -lse * kLog2E;
    if (results.d_lse) delta[i] -= results.d_lse[begin + i];
  }
}

template <class E>
void gradient(const AttentionHead& head, const AttentionResults& results, const BackwardPart& part, void* memory) {
  [[maybe_unused]] const Tiles tiles;
  const int64_t width = head.q.width, v_width = head.v.width;
  const int64_t begin = part.row_begin, end = part.row_end, n_rows = end - begin;
  const int64_t n_packed = round_up(n_rows, E::kStep), offset = head.k.count - head.q.count;
  const GradientScratch<E> scratch(memory, n_rows, width, v_width);
  const typename E::Block block(scratch.block);
  E::pack_keys(head.q, head.dtype, begin, end, scratch.q_columns);
  E::pack_keys(results.d_out, head.dtype, begin, end, scratch.d_out_columns);
  if (part.d_k) {
    E::pack_values(head.q, head.dtype, begin, end, scratch.q_rows);
    E::pack_values(results.d_out, head.dtype, begin, end, scratch.d_out_rows);
  }
  note_rows(results, head.dtype, begin, end, n_packed, scratch.minus_lse, scratch.delta);
  if (part.d_q) std::memset(scratch.d_q, 0, GradientScratch<E>::d_q_bytes(n_rows, width));
  AttentionHead keys = head, values = head;  // whose rows pack_rows is to take
  keys.q = head.k;
  values.q = head.v, values.scale = 1.0f;

  for (int64_t key = part.key_begin; key < part.key_end; key += E::kKeyBlock) {
    const int64_t key_end = key + E::kKeyBlock < part.key_end ? key + E::kKeyBlock : part.key_end;
    const int64_t n_keys = key_end - key, tile_keys = round_up(n_keys, E::kTileRows);
    // The rows that see some of the keys, counted from the part's first.
    int64_t first = head.right < 0 ? 0 : key - offset - head.right - begin;
    int64_t last = head.left < 0 ? n_rows : key_end - offset + head.left - begin;
    first = first < 0 ? 0 : first / E::kStep * E::kStep;
    last = last < n_rows ? last : n_rows;
    if (first >= last) continue;
    const RowList listed{nullptr, key, n_keys};
    E::pack_rows(keys, listed, scratch.key_tiles);
    E::pack_rows(values, listed, scratch.value_tiles);
    if (part.d_q) E::turn_keys(head.k, head.dtype, key, key_end, scratch.turned_keys);

    for (int64_t row = first; row < last;) {
      const int64_t block_begin = row / E::kRowBlock * E::kRowBlock, block_end = block_begin + E::kRowBlock;
      const int64_t to = round_up(last < block_end ? last : block_end, E::kStep);
      for (int64_t at = row; at < to; at += E::kStep) {
        const TileRows rows{begin + at, scratch.minus_lse + at, scratch.delta + at};
        for (int64_t tile = 0; tile < tile_keys; tile += E::kTileRows) {
          float* const s = block.scores(tile, at - block_begin);
          float* const dp = block.products(tile, at - block_begin);
          constexpr int64_t pitch = E::Block::kPitch;
          E::multiply(E::tile_of(scratch.key_tiles, tile, width), E::kTileRows, scratch.q_columns, at, E::kStep, width,
                      s, pitch);
          E::multiply(E::tile_of(scratch.value_tiles, tile, v_width), E::kTileRows, scratch.d_out_columns, at, E::kStep,
                      v_width, dp, pitch);
          const int64_t first_key = key + tile, last_key = first_key + E::kTileRows - 1;
          const bool plain = !head.bias && !(head.softcap > 0) && last_key < key_end &&
                             (head.right < 0 || last_key - offset - head.right <= rows.first) &&
                             (head.left < 0 || first_key - offset + head.left >= rows.first + E::kStep - 1);
          float* const d_bias = part.d_k ? part.d_bias : nullptr;
          if (plain) {
            for (int i = 0; i < E::kTileRows; ++i)
              differentiate<E, true>(head, first_key + i, key_end, rows, s + i * pitch, dp + i * pitch, d_bias);
          } else {
            for (int i = 0; i < E::kTileRows; ++i)
              differentiate<E, false>(head, first_key + i, key_end, rows, s + i * pitch, dp + i * pitch, d_bias);
          }
          block.keep_tile(tile, at - block_begin);
        }
      }
      const int64_t column = row - block_begin;
      if (part.d_k) {
        const int64_t at = key - part.key_begin;
        E::add_to_keys(block.p, tile_keys, column, scratch.d_out_rows, row, to - row, v_width,
                       part.d_v + at * E::padded(v_width));
        E::add_to_keys(block.ds, tile_keys, column, scratch.q_rows, row, to - row, width,
                       part.d_k + at * E::padded(width));
      }
      if (part.d_q) E::add_to_queries(block, n_keys, column, scratch.turned_keys, row, to - row, width, scratch.d_q);
      row = to;
    }
  }
  if (part.d_q) E::write_queries(scratch.d_q, n_rows, width, head.scale, head.dtype, part.d_q, part.d_q_stride);
}

template <class E>
size_t sum_bytes(int64_t n_keys, int64_t width) {
  return size_t(round_up(n_keys, E::kKeyBlock) * E::padded(width)) * sizeof(float);
}

template <class E>
void write_sums(const float* sums, int64_t n_keys, int64_t width, float factor, Dtype dtype, void* out,
                int64_t out_stride) {
  for (int64_t i = 0; i < n_keys; ++i)
    write_row(sums + i * E::padded(width), factor, width, dtype, out, i * out_stride);
}

template <class E>
constexpr BackwardEngine engine_of() {
  return {E::kRowBlock, E::kKeyBlock, sum_bytes<E>, GradientScratch<E>::bytes, gradient<E>, write_sums<E>};
}

#if defined(FASTOK_AMX)
constexpr BackwardEngine kBf16 = engine_of<Bf16Gradient>();
#endif

}  // namespace

extern const BackwardKernels backward_kernels;
const BackwardKernels backward_kernels = {engine_of<Fp32Gradient>(),
#if defined(FASTOK_AMX)
                                          &kBf16
#else
                                          nullptr
#endif
};

}  // namespace fastok::FASTOK_ISA
