// Packing and unpacking pages on CUDA: a block per page of one head. Sums are in ascending order and nothing is fused,
// so that the bytes are those of the specification. Torch-free.
#pragma once
#include "quantize/packed_cache.cuh"
#include "quantize/quantize_plan.h"

namespace fastok::cuda {

// ---- packing --------------------------------------------------------------------------------------------------------

struct SealParams {
  KvFormat fmt;
  Cosines cosines;
  uint8_t* data;
  int64_t bytes;
  const int64_t* offset;   // [B, G, pages]
  const uint8_t* classes;  // [B, G, pages, bytes of bits]; nullptr: one class
  const f16* channels[2];  // [B, G, D]
  const void* source[2];   // [B, pages * page, G, D]
  int64_t strides[2][3];   // of B, tokens, G
  float gamma[2];
  int groups, pages;
};

// x in the scale dtype, rounded to nearest (0) or in a direction, NaN where out of range: what is stored, and its bits.
template <class S, class Bits>
__device__ inline float round_scale(float x, int direction, Bits infinity, Bits nan, Bits& bits) {
  S rounded;
  narrow(x, rounded);
  const float back = widen(rounded);
  __builtin_memcpy(&bits, &rounded, sizeof bits);
  if (direction < 0 ? back > x : direction > 0 && back < x) bits = next_bits(bits, direction);
  if ((bits & infinity) == infinity) bits = nan;
  __builtin_memcpy(&rounded, &bits, sizeof bits);
  return widen(rounded);
}
__device__ inline float write_scale(KvScale kind, uint8_t* array, int64_t i, float x, int direction) {
  if (kind == KvScale::f32) {
    uint32_t bits;
    const float stored = round_scale<float, uint32_t>(x, direction, 0x7f800000u, 0x7fc00000u, bits);
    reinterpret_cast<uint32_t*>(array)[i] = bits;
    return stored;
  }
  uint16_t bits;
  const float stored = kind == KvScale::f16 ? round_scale<f16, uint16_t>(x, direction, 0x7c00, 0x7e00, bits)
                                            : round_scale<bf16, uint16_t>(x, direction, 0x7f80, 0x7fc0, bits);
  reinterpret_cast<uint16_t*>(array)[i] = bits;
  return stored;
}

// What codes of a group are made with: `lo` is subtracted and the rest divided by `step`; of trits and signs `lo` is
// the threshold. No step: no codes.
struct Coder {
  float lo, step;
};

// Parameters of the group at(0) ... at(count - 1), written as number i of the arrays. `top`: the largest code.
template <class At>
__device__ inline Coder write_group(const KvFormat& fmt, const KvSide& side, const KvPart& part, float top, float gamma,
                                    uint8_t* scales, uint8_t* zeros, int64_t i, int count, const At& at) {
  const float nan = __uint_as_float(0x7fc00000u);
  bool finite = true;
  for (int j = 0; j < count; ++j) finite = finite && isfinite(at(j));
  if (part.kind == KvKind::affine) {
    float least = at(0), most = least;
    for (int j = 1; j < count; ++j) {
      const float x = at(j);
      least = x < least ? x : least, most = x > most ? x : most;
    }
    // Zeros and ranges of -0 are 0.
    float zero = write_scale(fmt.scale, zeros, i, finite ? __fadd_rn(least, 0.0f) : 0.0f, -1);
    const float span = finite ? __fadd_rn(__fsub_rn(most, zero), 0.0f) : nan;
    // Two classes share the channels' ranges, so the range is what is stored.
    const float scale = write_scale(fmt.scale, scales, i, side.shares_ranges() ? span : span / top, 1);
    if (isnan(scale)) zero = write_scale(fmt.scale, zeros, i, 0.0f, 0);
    return {zero, scale};
  }
  float sum = 0;
  for (int j = 0; j < count; ++j) sum = __fadd_rn(sum, finite ? fabsf(at(j)) : 0.0f);
  const float mean = finite ? sum / float(count) : nan;
  if (part.kind == KvKind::sign) return {0, isnan(write_scale(fmt.scale, scales, i, mean, 0)) ? 0.0f : 1.0f};
  const float threshold = __fmul_rn(mean, gamma);
  float total = 0;
  int beyond = 0;
  for (int j = 0; j < count; ++j) {
    const float size = fabsf(at(j));
    if (size > threshold) total = __fadd_rn(total, size), ++beyond;
  }
  const float scale = side.compat || !finite ? mean : total / float(max(beyond, 1));
  return {threshold, isnan(write_scale(fmt.scale, scales, i, scale, 0)) ? 0.0f : 1.0f};
}

__device__ inline uint32_t code_of(const KvPart& part, const Coder& coder, float top, float x) {
  if (!(coder.step > 0)) return 0;
  if (part.kind == KvKind::sign) return x >= 0;
  if (part.kind == KvKind::trit) return fabsf(x) > coder.lo ? (x > 0 ? 2 : 0) : 1;
  const float code = rintf(__fsub_rn(x, coder.lo) / coder.step);
  return uint32_t(code > 0 ? (code < top ? code : top) : 0.0f);
}

// Byte i of a row of codes.
__device__ inline uint8_t pack_byte(const uint8_t* codes, int bits, int channels, int i) {
  const int bytes = int(kv_code_bytes(bits, channels)), planes = bits == 0 ? 5 : 8 / bits;
  uint32_t sum = 0;
  for (int plane = planes - 1; plane >= 0; --plane) {
    const int c = plane * bytes + i;
    sum = (bits == 0 ? 3 * sum : sum << bits) + (c < channels ? codes[c] : 0);
  }
  return uint8_t(sum);
}

// Grid: a block per page of each head.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads, 4) kv_seal_kernel(const __grid_constant__ SealParams p) {
  const KvFormat& fmt = p.fmt;
  const int thread = int(threadIdx.x), page_index = int(blockIdx.x) % p.pages, width = int(fmt.key.width);
  const int head = int(blockIdx.x) / p.pages, b = head / p.groups, g = head % p.groups;
  const int page_tokens = int(fmt.page), group = int(fmt.group);
  const uint8_t* const classes = p.classes ? p.classes + int64_t(blockIdx.x) * ((page_tokens + 7) / 8) : nullptr;
  const auto is_high = [&](int t) { return !classes || (classes[t / 8] >> (t % 8) & 1); };
  PackedPage page{p.offset[blockIdx.x], page_tokens, page_tokens, int(fmt.token_groups)};
  if (classes) page.n_high = count_high(classes, page_tokens);
  const int64_t low = page.n - page.n_high, key_size = fmt.key.size(page.n_high, low, page.filled);
  const int64_t size = key_size + fmt.value.size(page.n_high, low, page.filled);
  if (page.at < 0 || page.at % 16 != 0 || page.at > p.bytes - size) return;  // it would end behind the data

  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  float* const slab = memory.take<float>(kSlab, "slab");
  int code_rows = kTokenTile;
  for (int which = 0; which < 2; ++which)
    if (!(which ? fmt.value : fmt.key).per_token) code_rows = max(code_rows, group);
  uint8_t* const codes = memory.take<uint8_t>(code_rows * width, "codes");
  float* const table = memory.take<float>(int(kMostChannels), "cosines");
  auto* const order = memory.take<int16_t>(int(kMostChannels), "order");
  const int most_groups = kTokenTile * int(kMostTokenGroups);
  float* const lows = memory.take<float>(most_groups, "lows");
  float* const steps = memory.take<float>(most_groups, "steps");
  float* const tops = memory.take<float>(most_groups, "tops");
  auto* const ranks = memory.take<int16_t>(int(kMostPage), "ranks");
  p.cosines.spread(table);
  for (int t = thread; t < page_tokens; t += kQuantizeThreads) {
    const int high = classes ? count_high(classes, t) : t;
    ranks[t] = int16_t(is_high(t) ? high : page.n_high + t - high);
  }

  for (int which = 0; which < 2; ++which) {
    const KvSide& side = which ? fmt.value : fmt.key;
    const PackedHalf half = PackedHalf::of(fmt, which, page, p.data);
    const f16* const channels = p.channels[which] ? p.channels[which] + int64_t(head) * width : nullptr;
    __syncthreads();  // nobody needs the keys' order any more
    order_channels(side.hard > 0 ? channels : nullptr, width, order, nullptr);
    // What aligns the codes and the record.
    const int64_t code_end = page.n_high * side.row_bytes(true) + low * side.row_bytes(false);
    const int64_t param_end = side.params_size(page.n_high, low, page.filled);
    for (int64_t i = code_end + thread; i < half.params - half.codes; i += kQuantizeThreads) half.codes[i] = 0;
    for (int64_t i = param_end + thread; i < kv_aligned(param_end); i += kQuantizeThreads) half.params[i] = 0;
    __syncthreads();

    uint8_t* arrays = half.params;
    int row_at = 0;  // of the part's bytes in a row
    for (int part_index = 0; part_index < side.n_parts; ++part_index) {
      const KvPart& part = side.part[part_index];
      const int part_channels = int(part.channels), groups = int(side.groups_of(part));
      uint8_t* const zeros = arrays + int64_t(half.rows) * groups * side.scale_bytes;
      // Place c of the part's coded row of token t.
      const auto coded = [&](int t, int c) {
        const T* const x = static_cast<const T*>(p.source[which]) + int64_t(b) * p.strides[which][0] +
                           (int64_t(page_index) * page_tokens + t) * p.strides[which][1] + g * p.strides[which][2];
        if (!part.fourier) {
          const int d = order[int(part.first) + c];
          return side.channel_scale ? widen(x[d]) / widen(channels[d]) : widen(x[d]);
        }
        float sum = __fmul_rn(widen(x[order[0]]), fourier_element(table, part_channels, 0, c));
        for (int i = 1; i < part_channels; ++i)
          sum = __fadd_rn(sum, __fmul_rn(widen(x[order[i]]), fourier_element(table, part_channels, i, c)));
        return sum;
      };
      // Rows of the slab are tokens in order, or by their ranks where classes have arrays of their own.
      const bool by_rank = side.own_arrays;
      const int tile = side.per_token ? kTokenTile : group;
      for (int first = 0; first < page_tokens; first += tile) {
        const int tokens = min(tile, page_tokens - first);
        const int slab_width = side.per_token ? part_channels : min(slab_channels(group), part_channels);
        const int pitch = side.per_token ? slab_width + 1 : slab_width;
        const auto rank_of = [&](int row) { return by_rank ? row : int(ranks[first + row]); };
        const auto part_of = [&](int row) -> const KvPart& {
          return side.part_of(part_index, rank_of(row) < page.n_high);
        };
        for (int begin = 0; begin < part_channels; begin += slab_width) {
          const int columns = min(slab_width, part_channels - begin);
          for (int i = thread; i < tokens * columns; i += kQuantizeThreads) {
            const int t = i / columns, row = by_rank ? ranks[t] : t;
            slab[row * pitch + i % columns] = coded(first + t, begin + i % columns);
          }
          __syncthreads();
          if (side.per_token) {
            for (int i = thread; i < tokens * groups; i += kQuantizeThreads) {
              const int t = i / groups, channel = i % groups * group;
              const float* const row = slab + t * pitch + channel;
              tops[i] = top_code(part_of(t));
              const Coder coder = write_group(fmt, side, part, tops[i], p.gamma[which], arrays, zeros,
                                              int64_t(rank_of(t)) * groups + i % groups,
                                              min(group, part_channels - channel), [&](int j) { return row[j]; });
              lows[i] = coder.lo, steps[i] = coder.step;
            }
          } else {
            for (int i = thread; i < (by_rank ? 2 : 1) * columns; i += kQuantizeThreads) {
              const bool high = i < columns;
              const int column = high ? i : i - columns, from = high ? 0 : page.n_high;
              const int count = !by_rank ? tokens : high ? page.n_high : tokens - from;
              if (count == 0) continue;
              const KvPart& own = side.part_of(part_index, high);
              const Coder coder =
                  write_group(fmt, side, own, top_code(own), p.gamma[which], high ? arrays : half.low_params, zeros,
                              int64_t(first / group) * groups + begin + column, count,
                              [&](int j) { return slab[(from + j) * pitch + column]; });
              lows[i] = coder.lo, steps[i] = coder.step;
            }
          }
          __syncthreads();
          for (int i = thread; i < tokens * columns; i += kQuantizeThreads) {
            const int row = i / columns, c = i % columns;
            const int of = side.per_token ? row * groups + c / group : by_rank && row >= page.n_high ? columns + c : c;
            const KvPart& own = part_of(row);
            const float top = top_code(own);
            const Coder coder{lows[of], side.shares_ranges() ? steps[of] / top : steps[of]};
            codes[row * part_channels + begin + c] = uint8_t(code_of(own, coder, top, slab[row * pitch + c]));
          }
          __syncthreads();
        }
        const int most_bytes = int(part.bytes());
        for (int i = thread; i < tokens * most_bytes; i += kQuantizeThreads) {
          const int row = i / most_bytes, at = i % most_bytes, bits = part_of(row).bits;
          if (at < int(kv_code_bytes(bits, part_channels)))
            half.row(side, page, rank_of(row))[row_at + at] =
                pack_byte(codes + row * part_channels, bits, part_channels, at);
        }
        __syncthreads();
      }
      row_at += int(part.bytes());
      arrays += int64_t(half.rows) * part.arrays() * groups * side.scale_bytes;
    }
  }
}

// ---- unpacking ------------------------------------------------------------------------------------------------------

struct UnsealParams {
  PackedView cache;
  Cosines cosines;
  void* out[2];  // [B, total, G, D]
  int total;
};

// Code c of a row.
__device__ inline uint32_t read_code(const uint8_t* row, int bits, int channels, int c) {
  const int bytes = int(kv_code_bytes(bits, channels));
  uint32_t rest = row[c % bytes];
  if (bits > 0) return rest >> (c / bytes * bits) & ((1u << bits) - 1);
  for (int plane = 0; plane < c / bytes; ++plane) rest /= 3;
  return rest % 3;
}

// Grid: a block per page of each head, and one more for its hot tokens and the zeros behind them.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads, 4) kv_unseal_kernel(const __grid_constant__ UnsealParams p) {
  const PackedView& cache = p.cache;
  const KvFormat& fmt = cache.fmt;
  const int thread = int(threadIdx.x), page_index = int(blockIdx.x) % (cache.pages + 1), width = cache.width();
  const int head = int(blockIdx.x) / (cache.pages + 1), g = head % cache.groups;
  const int64_t b = head / cache.groups;
  const auto out_row = [&](int which, int64_t place) {
    return static_cast<T*>(p.out[which]) + ((b * p.total + place) * cache.groups + g) * width;
  };

  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  float* const slab = memory.take<float>(kSlab, "slab");  // rows of codes' values
  float* const table = memory.take<float>(int(kMostChannels), "cosines");
  auto* const inverse = memory.take<int16_t>(int(kMostChannels), "inverse");
  int* const scratch = memory.take<int>(kTokenTile, "scratch");
  int* const ranks = memory.take<int>(kTokenTile, "ranks");
  int* const slots = memory.take<int>(kTokenTile, "slots");

  int before = 0, first;
  for (int i = thread; i < page_index * int(fmt.token_groups); i += kQuantizeThreads)
    before += cache.count(b, g, i / int(fmt.token_groups), i % int(fmt.token_groups));
  block_exclusive_sum(before, scratch, first);
  if (page_index == cache.pages) {
    const int hot = cache.hot_length(b, g);
    for (int which = 0; which < 2; ++which) {
      const T* const from = cache.hot_row<T>(which, b, g, 0);
      for (int t = warp_index(); t < p.total - first; t += kQuantizeThreads / kWarpSize) {
        for (int d = lane_index(); d < width; d += kWarpSize) {
          T x{};
          if (t < hot) x = from[t * cache.hot_strides[which][2] + d];
          out_row(which, first + t)[d] = x;
        }
      }
    }
    return;
  }
  const PackedPage page = cache.page(b, g, page_index);
  const uint8_t* const classes = cache.classes_of(b, g, page_index);
  p.cosines.spread(table);
  for (int which = 0; which < 2; ++which) {
    const KvSide& side = cache.side(which);
    const f16* const channels = cache.channels_of(which, b, g);
    const PackedHalf half = PackedHalf::of(fmt, which, page, cache.data);
    __syncthreads();  // nobody needs the keys' order any more
    order_channels(side.hard > 0 ? channels : nullptr, width, nullptr, inverse);
    for (int begin = 0; begin < page.n; begin += kTokenTile) {
      const int tokens = min(kTokenTile, page.n - begin), pitch = width + 1;
      if (thread < tokens) {
        const int t = begin + thread, high = classes ? count_high(classes, t) : t;
        const bool is_high = !classes || (classes[t / 8] >> (t % 8) & 1);
        ranks[thread] = is_high ? high : page.n_high + t - high;
        int slot = 0, end = 0;
        for (int j = 0; j < int(fmt.token_groups); ++j) {
          end += cache.count(b, g, page_index, j);
          slot += t >= end && cache.count(b, g, page_index, j) > 0;
        }
        slots[thread] = slot;
      }
      __syncthreads();
      for (int i = thread; i < tokens * width; i += kQuantizeThreads) {
        const int t = i / width, c = i % width;
        float x = 0;
        if (page.at >= 0) {
          const bool high = ranks[t] < page.n_high;
          const int easy = int(side.part[0].channels), part_index = side.n_parts > 1 && c >= easy;
          const KvPart& part = side.part_of(part_index, high);
          const uint32_t code = read_code(half.row(side, page, ranks[t]) + (part_index ? side.part[0].bytes() : 0),
                                          part.bits, int(part.channels), c - int(part.first));
          const Parameters by = read_parameters(fmt, side, half, side.per_token ? ranks[t] : slots[t], c, high);
          x = float(code) * by.scale + by.zero;
        }
        slab[t * pitch + c] = x;
      }
      __syncthreads();
      for (int i = thread; i < tokens * width; i += kQuantizeThreads) {
        const int t = i / width, d = i % width;
        if (first + begin + t >= p.total) continue;
        const f16* const factors = side.channel_scale ? channels : nullptr;
        narrow(plain_value(side, inverse, factors, table, d, slab + t * pitch), out_row(which, first + begin + t)[d]);
      }
      __syncthreads();
    }
  }
}

}  // namespace fastok::cuda
