// Decode attention over packed caches on CUDA. A block has up to 16 rows of one KV head's queries and a split of its
// pages, or of its hot tokens. Pages are walked segment by segment (packed_cache.cuh), a segment's rows shared out
// among the warps 8 or 16 at a time: their codes are copied ahead by cp.async, become tiles of integers (exact in 16
// bits) in shared memory, and are multiplied by tensor cores; fp32 caches by plain arithmetic.
//
// Along channels, scales of keys are folded into the queries, those of values into a tile's sums. Along tokens they are
// applied as codes become tiles. Spectra: queries are transformed once (Parseval), sums transformed back once.
// Torch-free.
#pragma once
#include "decode/decode_kernel.cuh"
#include "decode/packed_plan.h"
#include "quantize/packed_cache.cuh"

namespace fastok::cuda {

struct PackedParams {
  DecodeParams decode;  // without k, v, table and lengths
  PackedView cache;
  Cosines cosines;
  int bias_places;
  int page_splits, code_bytes[2];  // by the plan
};

// ---- codes to tiles -------------------------------------------------------------------------------------------------

// Exact for integers below 2^23, and faster than a conversion.
__device__ __forceinline__ float float_of_code(uint32_t code) { return __uint_as_float(0x4b000000u | code) - 0x1p23f; }

// Sends rows of codes on their way, 16 bytes at a time; returns how far behind `to` they begin.
__device__ __forceinline__ int send_codes(unsigned char* to, const uint8_t* codes, int bytes) {
  const int before = int(reinterpret_cast<uintptr_t>(codes) % 16);
  for (int at = lane_index() * 16; at < before + bytes; at += kWarpSize * 16)
    ptx::cp_async_16(to + at, codes - before + at, true);
  return before;
}

struct CodeRows {
  const unsigned char* codes;  // in shared memory, row after row
  int bytes, count;            // of a row; rows that there are
  int rank;                    // of the first one
  bool high;
};

// The part's codes of kRows rows to their columns of a tile, kBytes of a row at a time; zeros where there is no row.
// Along channels they stay codes, unless `scale` and `zero` of each column are given.
template <class T, int kRows, int kBytes>
__device__ __forceinline__ void unpack_part(unsigned char* tile, int pitch, const CodeRows& rows, int at,
                                            const KvFormat& fmt, const KvSide& side, const KvPart& part,
                                            const PackedHalf& half, const uint8_t* arrays, const float* scale,
                                            const float* zero) {
  const int bits = part.bits, channels = int(part.channels), first = int(part.first);
  const int bytes = int(kv_code_bytes(bits, channels)), pieces = bytes / kBytes, planes = bits == 0 ? 5 : 8 / bits;
  const int side_by_side = pieces < kWarpSize ? kWarpSize / pieces : 1, lane = lane_index();
  if (lane >= side_by_side * pieces) return;
  for (int row = lane / pieces; row < kRows; row += side_by_side) {
    for (int piece = pieces < kWarpSize ? lane % pieces : lane; piece < pieces; piece += kWarpSize) {
      const bool there = row < rows.count;
      uint32_t rest[kBytes];
#pragma unroll
      for (int i = 0; i < kBytes; ++i) rest[i] = 0;
      if (there) {
        const unsigned char* const from = rows.codes + row * rows.bytes + at + piece * kBytes;
        const auto word = *reinterpret_cast<const Pack<uint8_t, kBytes>*>(from);
#pragma unroll
        for (int i = 0; i < kBytes; ++i) rest[i] = word.at[i];
      }
      for (int plane = 0; plane < planes; ++plane) {
        const int channel = plane * bytes + piece * kBytes;
        if (channel >= channels) break;
        float x[kBytes];
#pragma unroll
        for (int i = 0; i < kBytes; ++i) {
          const uint32_t later = bits == 0 ? rest[i] / 3 : rest[i] >> bits;
          x[i] = float_of_code(bits == 0 ? rest[i] - 3 * later : rest[i] & ((1u << bits) - 1));
          rest[i] = later;
        }
        if (scale) {
#pragma unroll
          for (int i = 0; i < kBytes; ++i) x[i] = x[i] * scale[first + channel + i] + zero[first + channel + i];
        } else if (side.per_token) {  // groups are multiples of 8 channels
          Parameters by{0, 0};
          if (there) by = read_parameters(fmt, side, part, arrays, half.rows, rows.rank + row, channel);
          // As released, the real and the imaginary components of a spectrum stand for different numbers.
          const bool differ = side.compat && part.fourier;
#pragma unroll
          for (int i = 0; i < kBytes; ++i) {
            const float zero = !differ ? by.zero : (channel + i <= channels / 2 ? 0.0f : -0.5f) * by.scale;
            x[i] = x[i] * by.scale + zero;
          }
        }
        T* const to = reinterpret_cast<T*>(tile + row * pitch) + first + channel;
        if constexpr (kBytes == 1) {
          narrow(x[0], *to);
        } else {
          put_pair<T>(reinterpret_cast<unsigned char*>(to), x[0], x[1]);
          put_pair<T>(reinterpret_cast<unsigned char*>(to + 2), x[2], x[3]);
        }
      }
    }
  }
}

template <class T, int kRows>
__device__ inline void unpack_rows(unsigned char* tile, int pitch, const CodeRows& rows, const KvFormat& fmt,
                                   const KvSide& side, const PackedHalf& half, const float* scale, const float* zero) {
  int at = 0;
  const uint8_t* arrays = half.params;
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part_of(i, rows.high);
    const int bytes = int(part.bytes());
    const bool aligned = (reinterpret_cast<uintptr_t>(rows.codes) | uintptr_t(rows.bytes) | uintptr_t(at) |
                          uintptr_t(bytes) | uintptr_t(part.first) | uintptr_t(part.channels)) %
                             4 ==
                         0;
    if (aligned) {
      unpack_part<T, kRows, 4>(tile, pitch, rows, at, fmt, side, part, half, arrays, scale, zero);
    } else {
      unpack_part<T, kRows, 1>(tile, pitch, rows, at, fmt, side, part, half, arrays, scale, zero);
    }
    at += bytes;
    arrays += int64_t(half.rows) * part.arrays() * side.groups_of(part) * side.scale_bytes;
  }
}

// ---- queries and results in the basis of the codes ------------------------------------------------------------------

// Place c of a query row as coded keys see it; `at(d)` is channel d.
template <class At>
__device__ float coded_query(const KvSide& side, const int16_t* order, const f16* factors, const float* table, int c,
                             const At& at) {
  const KvPart& easy = side.part[0];
  if (!easy.fourier || c >= int(easy.channels)) return at(order[c]) * (factors ? widen(factors[c]) : 1.0f);
  const int n = int(easy.channels);
  float sum = 0;
  for (int i = 0; i < n; ++i) sum += at(order[i]) * fourier_element(table, n, i, c);
  return sum * component_weight(n, c);
}

// The power of two that a row with this largest element is divided by, to be exact in few bits.
__device__ __forceinline__ float unit_of(float largest) {
  return largest > 0x1p-100f && largest < 0x1p100f ? __uint_as_float(__float_as_uint(largest) & 0x7f800000u) : 1.0f;
}

// Whether `place` is among tokens[count], which ascend.
__device__ inline bool is_listed(const int* tokens, int count, int place) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (tokens[middle] < place) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < count && tokens[low] == place;
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

static_assert(shared_bytes<Segment>(2) <= kSegmentBytes);

// Grid: blocks of 16 rows of query heads that share keys, in batches; splits of pages, then of hot tokens.
template <class T, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, 2) packed_kernel(const __grid_constant__ PackedParams params) {
  constexpr int kKeys = packed_keys(kWidth, sizeof(T)), kColumns = kKeys / 8, kPitch = tile_pitch(kWidth, sizeof(T));
  constexpr int kSteps = depth_steps(kWidth, sizeof(T)), kTurn = int(kMostChannels);
  constexpr bool kFoldValues = kWidth <= 128;  // into sums, of which wider heads leave no room for two
  const DecodeParams& p = params.decode;
  const PackedView& cache = params.cache;
  const int lane = lane_index(), warp = warp_index(), thread = int(threadIdx.x), split = int(blockIdx.y);
  const int width = p.width, head_blocks = p.heads / p.pack;
  const int first_row = int(blockIdx.x) % p.row_tiles * kDecodeRows;
  const int first_head = int(blockIdx.x) / p.row_tiles % head_blocks * p.pack, g = first_head / p.group;
  const int64_t b = int(blockIdx.x) / p.row_tiles / head_blocks;
  const int row_count = min(p.rows * p.pack - first_row, kDecodeRows);
  const auto query_of = [&](int row) { return (first_row + row) / p.pack; };
  const auto head_of = [&](int row) { return first_head + (first_row + row) % p.pack; };
  const auto lse_index = [&](int row) { return (b * p.heads + head_of(row)) * p.rows + query_of(row); };
  const bool hot = split >= params.page_splits;

  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  float* const queries = memory.take<float>(kDecodeRows * kWidth, "queries");  // as the codes see them
  auto* const query_tile = memory.take<unsigned char>(kDecodeRows * kPitch, "query_tile");
  auto* const tile = memory.take<unsigned char>(kDecodeWarps * kKeys * kPitch, "tiles") + warp * kKeys * kPitch;
  float* const units = memory.take<float>(kDecodeRows, "units");    // what a row of query_tile was divided by
  float* const shifts = memory.take<float>(kDecodeRows, "shifts");  // what zeros add to a row's products
  float* const key_scale = memory.take<float>(kWidth, "key_scale");
  float* const key_zero = memory.take<float>(kWidth, "key_zero");
  float* const value_scale = memory.take<float>(kWidth, "value_scale");
  float* const value_zero = memory.take<float>(kWidth, "value_zero");
  int* const places = memory.take<int>(int(kMostPage), "places");
  float* const table = memory.take<float>(kTurn, "cosines");
  auto* const order = memory.take<int16_t>(kTurn, "order");
  int* const scratch = memory.take<int>(8, "scratch");
  Segment* const segments = memory.take<Segment>(2, "segments");  // this one and the next, by turns
  // Last, so that the others lie where the compiler knows.
  unsigned char* codes[2];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int bytes = params.code_bytes[which];
    codes[which] = memory.take<unsigned char>(kDecodeWarps * bytes, which ? "value_codes" : "key_codes") + warp * bytes;
  }

  // How many tokens and pages this head has, and which are the split's.
  int own_pages = 0, own_tokens = 0, sealed, first_place = 0;
  for (int i = thread; i < cache.pages * int(cache.fmt.token_groups); i += kDecodeThreads) {
    const int page = i / int(cache.fmt.token_groups), n = cache.count(b, g, page, i % int(cache.fmt.token_groups));
    own_tokens += n;
    if (n > 0) own_pages = page + 1;
  }
  if (thread == 0) scratch[7] = 0;
  block_exclusive_sum(own_tokens, scratch, sealed);
  atomicMax(&scratch[7], own_pages);
  __syncthreads();
  own_pages = scratch[7];
  const int hot_length = cache.hot_length(b, g), length = sealed + hot_length;
  const int each = hot ? split_hot(hot_length) : split_pages(own_pages, int(cache.fmt.page));
  const int begin = (hot ? split - params.page_splits : split) * each;
  const int end = min(hot ? hot_length : own_pages, begin + each);
  if (begin >= end && p.splits > 1) {
    if (thread < row_count) p.split_lse[split * p.lse_rows + lse_index(thread)] = -kUnbounded;
    return;
  }
  if (!hot) {
    int before = 0;
    for (int i = thread; i < begin * int(cache.fmt.token_groups); i += kDecodeThreads)
      before += cache.count(b, g, i / int(cache.fmt.token_groups), i % int(cache.fmt.token_groups));
    block_exclusive_sum(before, scratch, first_place);
  }
  const int64_t list = b * p.lists + int64_t(first_head) * p.lists / p.heads;
  const int* const tokens = p.tokens ? p.tokens + list * p.list_size : nullptr;
  const int listed = tokens ? p.token_counts[list] : 0;
  const auto place_if_listed = [&](int place) { return !tokens || is_listed(tokens, listed, place) ? place : -1; };

  // Queries, and zeros where tiles are wider than heads or have fewer rows.
  params.cosines.spread(table);
  const KvSide &keys = cache.fmt.key, &values = cache.fmt.value;
  const f16* const key_channels = hot ? nullptr : cache.channels_of(0, b, g);
  order_channels(keys.hard > 0 ? key_channels : nullptr, width, order, nullptr);
  for (int i = thread; i < kDecodeRows * kPitch / 16; i += kDecodeThreads)
    reinterpret_cast<Pack<uint32_t, 4>*>(query_tile)[i] = {};
  for (int i = lane; i < kKeys * kPitch / 16; i += kWarpSize) reinterpret_cast<Pack<uint32_t, 4>*>(tile)[i] = {};
  for (int d = thread; d < kWidth; d += kDecodeThreads)
    key_scale[d] = 1, key_zero[d] = value_scale[d] = value_zero[d] = 0;
  __syncthreads();
  for (int i = thread; i < row_count * width; i += kDecodeThreads) {
    const int row = i / width, c = i % width;
    const T* const q = p.q.head<T>(b, head_of(row)) + query_of(row) * p.q.token_stride;
    const auto at = [&](int d) { return widen(q[d]); };
    queries[row * kWidth + c] =
        hot ? at(c) : coded_query(keys, order, keys.channel_scale ? key_channels : nullptr, table, c, at);
  }
  // Queries times the keys' scales, as tiles have them; by whole warps.
  const auto fold_queries = [&] {
    for (int row = warp; row < kDecodeRows; row += kDecodeWarps) {
      if (row >= row_count) {
        if (lane == 0) units[row] = 1, shifts[row] = 0;
        continue;
      }
      float largest = 0, shift = 0;
      for (int d = lane; d < width; d += kWarpSize) {
        largest = fmaxf(largest, fabsf(queries[row * kWidth + d] * key_scale[d]));
        shift += queries[row * kWidth + d] * key_zero[d];
      }
      for (int bit = 1; bit < kWarpSize; bit *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, bit));
        shift += __shfl_xor_sync(kFullWarp, shift, bit);
      }
      const float unit = sizeof(T) == 4 ? 1.0f : unit_of(largest);
      if (lane == 0) units[row] = unit, shifts[row] = shift;
      for (int d = lane; d < width; d += kWarpSize)
        narrow(queries[row * kWidth + d] * key_scale[d] / unit, reinterpret_cast<T*>(query_tile + row * kPitch)[d]);
    }
  };
  __syncthreads();
  if (hot || keys.per_token) fold_queries();
  __syncthreads();

  OnlineSoftmax<1> softmax;
  softmax.reset();
  float out[1][kWidth / 8][4] = {};
  float x[1][kColumns][4], shrink[1][2];
  // Logits of a tile of keys, and their softmax. `own`: the place of the lane's key, -1: none.
  const auto soften = [&](int own) {
    multiply_rows<T>(query_tile, tile, kPitch, kSteps, x);
#pragma unroll
    for (int i = 0; i < kColumns * 4; ++i) {
      const int row = 8 * (i % 4 / 2) + lane / 4;
      x[0][i / 4][i % 4] = x[0][i / 4][i % 4] * units[row] + shifts[row];
    }
    scale_products(p.rule, x);
#pragma unroll
    for (int i = 0; i < kColumns * 4; ++i) {
      const int row = 8 * (i % 4 / 2) + lane / 4, key = i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int place = __shfl_sync(kFullWarp, own, key);
      float& logit = x[0][i / 4][i % 4];
      if (place < 0 || place > length - p.rows + query_of(row)) {
        logit = -kUnbounded;
      } else if (p.bias.data && row < row_count && place < params.bias_places) {
        logit += p.bias.head(b, head_of(row))[place * p.bias.token_stride] * p.rule.bias_scale;
      }
    }
    softmax.template advance<T>(x, shrink);
  };
  const auto shrink_sums = [&] {
#pragma unroll
    for (int i = 0; i < kWidth / 8 * 4; ++i) out[0][i / 4][i % 4] *= shrink[0][i % 4 / 2];
  };

  if (hot) {
    for (int at = begin + warp * kKeys; at < end; at += kDecodeWarps * kKeys) {
      const auto send = [&](int which) {
        constexpr int kElements = 16 / int(sizeof(T));
        const int chunks = width / kElements;
        for (int i = lane; i < kKeys * chunks; i += kWarpSize) {
          const int row = i / chunks, chunk = i % chunks;
          const bool there = at + row < end;
          ptx::cp_async_16(tile + row * kPitch + chunk * 16,
                           cache.hot_row<T>(which, b, g, there ? at + row : at) + chunk * kElements, there);
        }
        ptx::cp_async_wait_all();
        __syncwarp();
      };
      send(0);
      soften(lane < kKeys && at + lane < end ? place_if_listed(sealed + at + lane) : -1);
      __syncwarp();
      shrink_sums();
      send(1);
      add_values<T, kPitch>(x, tile, out);
      __syncwarp();
    }
  } else {
    if (thread == 0) segments[0] = Segment::begin(cache, b, g, begin, end, first_place);
    __syncthreads();
    const auto send = [&](const Segment& of, int i, int which) {
      int before = 0;
      if (of.page < end && i * kKeys < of.count) {
        const KvSide& side = cache.side(which);
        const PackedHalf half = PackedHalf::of(cache.fmt, which, of.shape, cache.data);
        const int rows = min(of.count - i * kKeys, kKeys);
        before = send_codes(codes[which], half.row(side, of.shape, of.rank + i * kKeys),
                            rows * int(side.row_bytes(of.high())));
      }
      ptx::cp_async_commit();
      return before;
    };
    int begins[2] = {send(segments[0], warp, 0), send(segments[0], warp, 1)};
    for (int turn = 0; segments[turn].page < end; turn ^= 1) {
      const Segment &segment = segments[turn], &next = segments[turn ^ 1];
      if (thread == kDecodeThreads - 1) segments[turn ^ 1] = segment.next(cache, b, g, end);
      const auto half_of = [&](int which) { return PackedHalf::of(cache.fmt, which, segment.shape, cache.data); };
      const bool high = segment.high();
      // Which of the page's tokens the rows are, and whether they take part.
      bool any = false;
      const uint8_t* const classes = cache.classes_of(b, g, segment.page);
      for (int entry = thread; entry < segment.shape.n; entry += kDecodeThreads) {
        int row = entry - segment.rank;
        if (classes) {
          const int before = count_high(classes, entry);
          const bool own = (classes[entry / 8] >> (entry % 8) & 1) == int(high);
          row = !own ? -1 : high ? before : entry - before;
        }
        if (row < 0 || row >= segment.count) continue;
        places[row] = place_if_listed(segment.first + entry);
        any = any || places[row] >= 0;
      }
      for (int which = 0; which < 2; ++which) {
        const KvSide& side = cache.side(which);
        if (side.per_token) continue;
        const PackedHalf half = half_of(which);
        for (int d = thread; d < width; d += kDecodeThreads) {
          const Parameters by = read_parameters(cache.fmt, side, half, segment.slot, d, high);
          (which ? value_scale : key_scale)[d] = by.scale, (which ? value_zero : key_zero)[d] = by.zero;
        }
      }
      const bool needed = __syncthreads_or(any);
      if (needed && !keys.per_token) fold_queries();
      __syncthreads();
      const int tiles = needed ? (segment.count + kKeys - 1) / kKeys : 0;
      for (int i = warp; i < tiles; i += kDecodeWarps) {
        const bool more = i + kDecodeWarps < tiles;
        const auto send_next = [&](int which) {
          return more ? send(segment, i + kDecodeWarps, which) : send(next, warp, which);
        };
        const int rank = segment.rank + i * kKeys, count = min(segment.count - i * kKeys, kKeys);
        const auto unpack = [&](const KvSide& side, int which) {
          ptx::cp_async_wait_groups<1>();
          __syncwarp();  // the codes are here
          const CodeRows rows{codes[which] + begins[which], int(side.row_bytes(high)), count, rank, high};
          const bool scaled = which == 1 && !kFoldValues && !side.per_token;
          unpack_rows<T, kKeys>(tile, kPitch, rows, cache.fmt, side, half_of(which), scaled ? value_scale : nullptr,
                                value_zero);
          __syncwarp();  // nobody needs them any more
          begins[which] = send_next(which);
        };
        unpack(keys, 0);
        soften(lane < count ? places[i * kKeys + lane] : -1);
        __syncwarp();  // nobody needs the keys any more
        unpack(values, 1);
        shrink_sums();
        if (!kFoldValues || values.per_token) {
          add_values<T, kPitch>(x, tile, out);
        } else {
          // As the products have them: rounded.
          float sums[2] = {0, 0};
#pragma unroll
          for (int j = 0; j < kColumns * 4; ++j) {
            T rounded;
            narrow(x[0][j / 4][j % 4], rounded);
            sums[j % 4 / 2] += widen(rounded);
          }
          for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) sums[half] += __shfl_xor_sync(kFullWarp, sums[half], bit);
          }
          constexpr int kSlice = 8;  // of 8 channels each
#pragma unroll
          for (int slice = 0; slice < kWidth / 8; slice += kSlice) {
            float sum[1][kSlice][4] = {};
            add_values<T, kPitch>(x, tile + slice * 8 * sizeof(T), sum);
#pragma unroll
            for (int j = 0; j < kSlice * 4; ++j) {
              const int d = slice * 8 + value_column<T>(j / 4, j % 2);
              out[0][slice + j / 4][j % 4] += sum[0][j / 4][j % 4] * value_scale[d] + sums[j % 4 / 2] * value_zero[d];
            }
          }
        }
        __syncwarp();  // nobody needs the values any more
      }
      if (warp >= tiles) {  // what was sent for this segment is of no use
        ptx::cp_async_wait_all();
        __syncwarp();
        begins[0] = send(next, warp, 0), begins[1] = send(next, warp, 1);
      }
      __syncthreads();  // nobody needs the segment's places and parameters any more
    }
  }
  softmax.agree();
  ptx::cp_async_wait_all();
  __syncthreads();  // shared memory is about to be divided anew

  SharedMemory results(shared);
  const WarpSums<T, kWidth> warps(results);
  float* const turn = results.take<float>(kTurn, "cosines");
  auto* const inverse = results.take<int16_t>(kTurn, "inverse");
  const f16* const value_channels = hot ? nullptr : cache.channels_of(1, b, g);
  params.cosines.spread(turn);
  order_channels(values.hard > 0 ? value_channels : nullptr, width, nullptr, inverse);
  warps.hold(softmax, out);
  __syncthreads();
  const auto coded_basis = !hot && (values.needs_channels() || values.part[0].fourier);
  constexpr int kParts = kWidth / 4;
  float log_sum;
  if (!coded_basis) {
    for (int i = thread; i < row_count * kParts; i += kDecodeThreads) {
      const int row = i / kParts, column = i % kParts * 4;
      const Pack<float, 4> total = warps.merge(row, column, log_sum);
      put_result<T>(p, split, (b * p.rows + query_of(row)) * p.heads + head_of(row), lse_index(row), column, total,
                    log_sum);
    }
    return;
  }
  // All sums of a row are merged, in the place of the first warp's, before any channel is made of them.
  for (int i = thread; i < row_count * kParts; i += kDecodeThreads) {
    const int row = i / kParts, column = i % kParts * 4;
    const Pack<float, 4> total = warps.merge(row, column, log_sum);
    *reinterpret_cast<Pack<float, 4>*>(warps.partial + row * WarpSums<T, kWidth>::kPitch + column) = total;
  }
  __syncthreads();
  for (int i = thread; i < row_count * kParts; i += kDecodeThreads) {
    const int row = i / kParts, column = i % kParts * 4;
    if (column >= width) continue;
    warps.merge(row, column, log_sum);
    Pack<float, 4> total;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      total.at[j] = plain_value(values, inverse, values.channel_scale ? value_channels : nullptr, turn, column + j,
                                warps.partial + row * WarpSums<T, kWidth>::kPitch);
    put_result<T>(p, split, (b * p.rows + query_of(row)) * p.heads + head_of(row), lse_index(row), column, total,
                  log_sum);
  }
}

}  // namespace fastok::cuda
