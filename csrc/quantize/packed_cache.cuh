// A packed cache as CUDA kernels see it (docs/kv-format.md): directory, pages, parameters, the order and the basis of
// coded channels. Whatever a directory holds, nothing outside the arrays is read. Torch-free.
#pragma once
#include "common/device.cuh"
#include "quantize/kv_format.h"
#include "quantize/spectrum.h"

namespace fastok::cuda {

// ---- spectra --------------------------------------------------------------------------------------------------------

// cos(2 pi i / 256) for the first quarter of a turn.
struct Cosines {
  float quarter[kMostChannels / 4 + 1];

  static Cosines make() {
    Cosines all;
    for (int i = 0; i <= kMostChannels / 4; ++i) all.quarter[i] = float(cosine(i, kMostChannels));
    return all;
  }
  // Of a whole turn, table[kMostChannels]; by all threads of the block.
  __device__ void spread(float* table) const {
    constexpr int kTurn = int(kMostChannels);
    for (int i = int(threadIdx.x); i < kTurn; i += int(blockDim.x)) {
      const int turn = min(i, kTurn - i);
      table[i] = turn > kTurn / 4 ? -quarter[kTurn / 2 - turn] : quarter[turn];
    }
  }
};

// What channel i counts in component j of the half spectrum of n reals, n a power of two.
__device__ __forceinline__ float fourier_element(const float* table, int n, int i, int j) {
  constexpr int kTurn = int(kMostChannels);
  const int turn = j <= n / 2 ? i * j : i * (j - n / 2) + n / 4;
  return table[turn * (kTurn / n) & (kTurn - 1)];
}
// What component j counts in an inner product.
__device__ __forceinline__ float component_weight(int n, int j) {
  return (j == 0 || j == n / 2 ? 1.0f : 2.0f) / float(n);
}

// ---- channels -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_hard(f16 flag) { return flag.bits != 0 && (flag.bits & 0x8000) == 0; }

// order[c]: the channel that place c of a coded row is taken from; `inverse` is where each channel is. Either may be
// nullptr. By all threads of the block; `flags` nullptr: as they are.
__device__ inline void order_channels(const f16* flags, int width, int16_t* order, int16_t* inverse) {
  for (int d = int(threadIdx.x); d < width; d += int(blockDim.x)) {
    int place = d;
    if (flags) {
      int before = 0, all = 0;
      for (int i = 0; i < width; ++i) {
        const int hard = is_hard(flags[i]);
        before += i < d ? hard : 0, all += hard;
      }
      place = is_hard(flags[d]) ? width - all + before : d - before;
    }
    if (order) order[place] = int16_t(d);
    if (inverse) inverse[d] = int16_t(place);
  }
}

// Channel d of a row that is in the order and the basis of the codes.
__device__ inline float plain_value(const KvSide& side, const int16_t* inverse, const f16* factors, const float* table,
                                    int d, const float* row) {
  const KvPart& easy = side.part[0];
  const int c = inverse[d];
  if (!easy.fourier || c >= int(easy.channels)) return row[c] * (factors ? widen(factors[d]) : 1.0f);
  const int n = int(easy.channels);
  float sum = 0;
  for (int j = 0; j < n; ++j) sum += row[j] * component_weight(n, j) * fourier_element(table, n, c, j);
  return sum;
}

// ---- pages ----------------------------------------------------------------------------------------------------------

struct PackedPage {
  int64_t at;  // where its record begins, -1: there is none within the data
  int n, n_high, filled;
};

struct PackedView {
  KvFormat fmt;
  const uint8_t* data;  // begins at a multiple of 16
  int64_t bytes;
  const int64_t* offset;  // [B, G, pages]
  int64_t offset_strides[3];
  const int16_t* counts;  // [B, G, pages, token groups]; the last are neighbours
  int64_t counts_strides[3];
  const uint8_t* classes;  // [B, G, pages, bytes], likewise; nullptr: one class
  int64_t classes_strides[3];
  const f16* channels[2];  // [B, G, D]
  const void* hot[2];      // [B, G, window, D]
  int64_t hot_strides[2][3];
  const int32_t* hot_lengths;  // [B, G]
  int groups, pages, window;

  __device__ int width() const { return int(fmt.key.width); }
  __device__ const KvSide& side(int which) const { return which ? fmt.value : fmt.key; }
  __device__ const f16* channels_of(int which, int64_t b, int g) const {
    return channels[which] ? channels[which] + (b * groups + g) * width() : nullptr;
  }
  template <class T>
  __device__ const T* hot_row(int which, int64_t b, int g, int i) const {
    const int64_t* const strides = hot_strides[which];
    return static_cast<const T*>(hot[which]) + b * strides[0] + g * strides[1] + i * strides[2];
  }
  __device__ int hot_length(int64_t b, int g) const { return max(0, min(hot_lengths[b * groups + g], window)); }
  __device__ int count(int64_t b, int g, int page, int token_group) const {
    const int64_t at = b * counts_strides[0] + g * counts_strides[1] + page * counts_strides[2] + token_group;
    return max(0, min(int(counts[at]), int(fmt.page / fmt.token_groups)));
  }
  __device__ const uint8_t* classes_of(int64_t b, int g, int page) const {
    return classes ? classes + b * classes_strides[0] + g * classes_strides[1] + page * classes_strides[2] : nullptr;
  }
  __device__ PackedPage page(int64_t b, int g, int i) const;
};

// High tokens among the first `end` of a page.
__device__ inline int count_high(const uint8_t* classes, int end) {
  int high = 0;
  for (int i = 0; i < end / 8; ++i) high += __popc(classes[i]);
  return end % 8 == 0 ? high : high + __popc(classes[end / 8] & ((1u << (end % 8)) - 1));
}

__device__ inline PackedPage PackedView::page(int64_t b, int g, int i) const {
  PackedPage page{-1, 0, 0, 0};
  for (int j = 0; j < int(fmt.token_groups); ++j) {
    const int own = count(b, g, i, j);
    page.n += own, page.filled += own > 0;
  }
  page.n_high = classes ? count_high(classes_of(b, g, i), page.n) : page.n;
  if (page.n == 0) return page;
  const int64_t at = offset[b * offset_strides[0] + g * offset_strides[1] + i * offset_strides[2]];
  const int64_t low = page.n - page.n_high;
  const int64_t size = fmt.key.size(page.n_high, low, page.filled) + fmt.value.size(page.n_high, low, page.filled);
  if (at >= 0 && at % 16 == 0 && at <= bytes - size) page.at = at;
  return page;
}

// Keys or values of a page: the high class's rows of codes, then the low one's, then the parameters.
struct PackedHalf {
  uint8_t *codes, *params;
  int rows;             // of the parameter arrays
  uint8_t* low_params;  // where the low class has arrays of its own

  __device__ static PackedHalf of(const KvFormat& fmt, int which, const PackedPage& page, const uint8_t* data) {
    const int low = page.n - page.n_high;
    const KvSide& side = which ? fmt.value : fmt.key;
    uint8_t* const codes =
        const_cast<uint8_t*>(data) + page.at + (which ? fmt.key.size(page.n_high, low, page.filled) : 0);
    uint8_t* const params = codes + side.codes_size(page.n_high, low);
    const int64_t rows = side.array_rows(page.n_high, low, page.filled);
    return {codes, params, int(rows), params + side.array_bytes(rows)};
  }
  // Rows by rank.
  __device__ uint8_t* row(const KvSide& side, const PackedPage& page, int rank) const {
    const int64_t high = min(rank, page.n_high), low = rank - high;
    return codes + high * side.row_bytes(true) + low * side.row_bytes(false);
  }
};

// ---- parameters -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float read_scale(const uint8_t* array, KvScale kind, int64_t i) {
  if (kind == KvScale::f16) return widen(reinterpret_cast<const f16*>(array)[i]);
  if (kind == KvScale::bf16) return widen(reinterpret_cast<const bf16*>(array)[i]);
  return reinterpret_cast<const float*>(array)[i];
}

// The largest code of an affine part; 1 for others.
__device__ __forceinline__ float top_code(const KvPart& part) {
  return part.kind == KvKind::affine ? float((1 << part.bits) - 1) : 1.0f;
}

// x = code * scale + zero.
struct Parameters {
  float scale, zero;
};

// Of channel c of a part whose arrays begin at `arrays` and have so many rows.
__device__ inline Parameters read_parameters(const KvFormat& fmt, const KvSide& side, const KvPart& part,
                                             const uint8_t* arrays, int64_t rows, int row, int c) {
  const int64_t groups = side.groups_of(part), i = row * groups + (side.per_token ? c / int(side.group) : c);
  const float s = read_scale(arrays, fmt.scale, i);
  if (part.kind == KvKind::affine) {
    const float zero = read_scale(arrays + rows * groups * side.scale_bytes, fmt.scale, i);
    return {side.shares_ranges() ? s / top_code(part) : s, zero};
  }
  if (part.kind == KvKind::trit) {
    // A NaN says that the group could not be stored, whatever the numerics.
    const float scale = side.compat ? 1.0f + 0.0f * s : s;
    return {scale, -scale};
  }
  if (!(side.compat && part.fourier)) return {2 * s, -s};
  return {s, c <= int(part.channels) / 2 ? 0.0f * s : -0.5f * s};
}

// Of place c of a coded row, whichever part it is in.
__device__ inline Parameters read_parameters(const KvFormat& fmt, const KvSide& side, const PackedHalf& half, int row,
                                             int c, bool high) {
  if (side.own_arrays && !high) return read_parameters(fmt, side, side.low, half.low_params, 1, row, c);
  const KvPart& first = side.part_of(0, high);
  if (side.n_parts == 1 || c < int(first.channels))
    return read_parameters(fmt, side, first, half.params, half.rows, row, c);
  const int64_t before = half.rows * first.arrays() * side.groups_of(first) * side.scale_bytes;
  return read_parameters(fmt, side, side.part[1], half.params + before, half.rows, row, c - int(first.channels));
}

// ---- segments -------------------------------------------------------------------------------------------------------

// Neighbouring rows of a page with the same parameters along channels: a token group, or a class. Walked in order.
struct Segment {
  int page, part, rank, count;  // part: the page's i-th token group or class; rank: its first row
  int slot;                     // row of arrays along channels
  int first;                    // place of the page's first token in the sequence
  PackedPage shape;

  __device__ static Segment begin(const PackedView& cache, int64_t b, int g, int page, int end, int first) {
    Segment segment{page, 0, 0, 0, 0, first, {}};
    if (page < end) segment.shape = cache.page(b, g, page);
    segment.settle(cache, b, g, end);
    return segment;
  }
  __device__ bool high() const { return rank < shape.n_high; }
  __device__ Segment next(const PackedView& cache, int64_t b, int g, int end) const {
    Segment segment = *this;
    segment.step();
    segment.settle(cache, b, g, end);
    return segment;
  }

 private:
  __device__ void step() { rank += count, slot += count > 0 && shape.filled > slot + 1, ++part; }
  // Goes on to the first segment that has rows; none: page is `end`, and the count 0.
  __device__ void settle(const PackedView& cache, int64_t b, int g, int end) {
    const int parts = cache.classes ? 2 : int(cache.fmt.token_groups);
    for (; page < end; step()) {
      if (part == parts || shape.at < 0) {
        first += shape.n, part = rank = count = slot = 0;
        if (++page == end) break;
        shape = cache.page(b, g, page);
        if (shape.at < 0) continue;
      }
      count = !cache.classes ? cache.count(b, g, page, part) : part == 0 ? shape.n_high : shape.n - shape.n_high;
      if (count > 0) return;
    }
    count = 0;
  }
};

}  // namespace fastok::cuda
