// The heart of matching: a block holds kRows rows against all columns, tile by tile, on the tensor cores, and keeps
// each row's best column in registers. The score matrix is never written.
#pragma once
#include <type_traits>

#include "common/device.cuh"
#include "match/match_plan.h"
#include "ptx/cp_async.h"
#include "ptx/cvt.h"
#include "ptx/ldmatrix.h"
#include "ptx/mma.h"

namespace fastok::cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNoNumber = __builtin_nanf("");

// Tokens of one sample: those at `positions`, or first, first + step, ...
struct TokenList {
  const int64_t* positions;
  int first, step, count;

  __device__ int at(int i) const { return positions ? int(positions[i]) : first + step * i; }
};

// Their rows. The last dimension is contiguous.
template <class T>
struct RowList {
  TokenList tokens;
  const T* data;
  int64_t stride;

  __device__ const T* row(int token) const { return data + token * stride; }
};

// Which columns may be chosen.
struct Candidates {
  int first_position;  // those before it may not
  const bool* mask;    // by column; nullptr: all
  int64_t mask_stride;

  __device__ bool allow(const TokenList& columns, int i) const {
    return columns.at(i) >= first_position && (!mask || mask[i * mask_stride]);
  }
};

// ---- norms ----------------------------------------------------------------------------------------------------------

// Sums of squares between these bounds are as exact as fp32 gets, and so are dot products of such rows. Rows outside
// (and not zero) are multiplied by a power of two first, which changes no rounding.
constexpr float kSmallestSafeSquare = 0x1p-80f, kLargestSafeSquare = 0x1p80f;

// A power of two that brings a row whose largest element is `peak` near 1; 1 if that is 0, infinite or NaN.
__device__ inline float range_scale(float peak) {
  if (!(peak > 0 && peak < kInfinity)) return 1.0f;
  if (peak < 0x1p-126f) return 0x1p126f;
  const uint32_t exponent = __float_as_uint(peak) >> 23;
  return __uint_as_float((exponent >= 253 ? 1u : 254 - exponent) << 23);
}

// 1 / max(norm, 1e-12) for a row that was multiplied by `scale`, to be applied to the scaled row. A row that holds an
// infinity or NaN has no direction.
__device__ inline float inverse_norm(float squares, float scale) {
  if (!(squares < kInfinity)) return kNoNumber;
  const float norm = sqrtf(squares);
  return norm < 1e-12f * scale ? 1e12f / scale : 1.0f / norm;
}

// ---- tiles in shared memory -----------------------------------------------------------------------------------------

// A tile row is kTileRowBytes long: eight 16-byte chunks, XORed with the row so that the eight rows that ldmatrix or
// eight neighbouring threads touch at once lie in different banks.
__device__ __forceinline__ unsigned char* tile_chunk(unsigned char* tile, int row, int chunk) {
  return tile + row * kTileRowBytes + ((chunk ^ (row & 7)) * 16);
}

// One thread's share of a tile's way from global to shared memory. Eight neighbouring threads carry one row, a 16-byte
// chunk each; each measures what it carried, and scales it if asked, before the others see it.
template <class T, int kRows, int kThreads, bool kScaled>
struct TileCarrier {
  static constexpr int kPasses = kRows * kTileChunks / kThreads;
  static constexpr int kElements = 16 / int(sizeof(T));
  // fp16 squares neither overflow nor vanish in fp32.
  static constexpr bool kMayBeUnsafe = !std::is_same_v<T, f16>;
  static_assert(kPasses * kThreads == kRows * kTileChunks);
  using Chunk = Pack<T, kElements>;

  int token[kPasses];  // -1 past the end
  float scale[kScaled ? kPasses : 1];
  float squares[kPasses];

  __device__ static int chunk() { return int(threadIdx.x) % kTileChunks; }
  __device__ static int tile_row(int pass) { return (pass * kThreads + int(threadIdx.x)) / kTileChunks; }
  __device__ static Chunk& place(unsigned char* tile, int pass) {
    return *reinterpret_cast<Chunk*>(tile_chunk(tile, tile_row(pass), chunk()));
  }

  // Turns to the tile that starts at row `begin`.
  __device__ void aim(const RowList<T>& rows, int begin, int width) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int i = begin + tile_row(pass);
      token[pass] = i < rows.tokens.count ? rows.tokens.at(i) : -1;
      squares[pass] = 0;
      if constexpr (kScaled) scale[pass] = scale_of(rows, token[pass], width);
    }
  }

  // Sends the elements from `depth` on, padded with zeros, on their way to `tile`.
  __device__ void depart(const RowList<T>& rows, int depth, const SweepShape& shape, unsigned char* tile) const {
    const int begin = depth + chunk() * kElements;
    const bool whole = shape.aligned && begin + kElements <= shape.width;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const bool valid = token[pass] >= 0 && begin < shape.width;
      Chunk& to = place(tile, pass);
      if (!valid) {
        to = Chunk{};
      } else if (whole) {
        ptx::cp_async_16(&to, rows.row(token[pass]) + begin, true);
      } else {
        const T* const from = rows.row(token[pass]) + begin;
#pragma unroll 1
        for (int e = 0; e < kElements; ++e) to.at[e] = begin + e < shape.width ? from[e] : T{};
      }
    }
  }

  // After cp_async_wait_all: adds up the squares of what has arrived.
  __device__ void measure(unsigned char* tile) {
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      Chunk values = place(tile, pass);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        float x = widen(values.at[e]);
        if constexpr (kScaled) {
          x *= scale[pass];
          narrow(x, values.at[e]);
        }
        squares[pass] += x * x;
      }
      if constexpr (kScaled) place(tile, pass) = values;
    }
  }

  // After the last chunk of a tile: gives each row's sum of squares and scale to `consume(tile row, squares, scale)` in
  // one of its threads. Returns whether some row is out of the safe range.
  template <class Consume>
  __device__ bool finish(const RowList<T>& rows, int width, const Consume& consume) {
    bool unsafe = false;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      float sum = squares[pass];
      for (int bit = 1; bit < kTileChunks; bit *= 2) sum += __shfl_xor_sync(kFullWarp, sum, bit);
      if constexpr (kMayBeUnsafe && !kScaled) {
        unsafe |= sum > kLargestSafeSquare;
        if (sum < kSmallestSafeSquare && token[pass] >= 0)
          unsafe |= sum > 0 || has_nonzero(rows.row(token[pass]), width);
      }
      if (chunk() == 0) {
        if constexpr (kScaled) {
          consume(tile_row(pass), sum, scale[pass]);
        } else {
          consume(tile_row(pass), sum, 1.0f);
        }
      }
    }
    return unsafe;
  }

 private:
  __device__ static bool has_nonzero(const T* x, int width) {
    for (int d = chunk(); d < width; d += kTileChunks)
      if (widen(x[d]) != 0) return true;
    return false;
  }

  // Called by the eight threads of a row together, hence by whole warps.
  __device__ static float scale_of(const RowList<T>& rows, int token, int width) {
    float peak = 0;
    for (int d = chunk(); token >= 0 && d < width; d += kTileChunks) {
      const float size = fabsf(widen(rows.row(token)[d]));
      peak = size > peak || isnan(size) ? size : peak;
    }
    for (int bit = 1; bit < kTileChunks; bit *= 2) {
      const float other = __shfl_xor_sync(kFullWarp, peak, bit);
      peak = other > peak || isnan(other) ? other : peak;
    }
    return range_scale(peak);
  }
};

// ---- products -------------------------------------------------------------------------------------------------------

// The words of 16 rows and of 8 columns that a warp multiplies at once: 32 bytes of each row.
template <class T>
struct Multiplier {
  uint32_t a[4];
  __device__ void load(const unsigned char* rows) { ptx::ldmatrix_x4(a, rows); }
  __device__ void multiply(float (&acc)[4], uint32_t b0, uint32_t b1) const {
    if constexpr (std::is_same_v<T, f16>) {
      ptx::mma_m16n8k16_f16(acc, a, b0, b1);
    } else {
      ptx::mma_m16n8k16_bf16(acc, a, b0, b1);
    }
  }
};

// fp32 as the sum of two tf32: of the four products, the smallest is below fp32's own rounding and left out.
template <>
struct Multiplier<float> {
  uint32_t high[4], low[4];

  __device__ static void split(uint32_t bits, uint32_t& high, uint32_t& low) {
    high = ptx::cvt_rna_tf32(__uint_as_float(bits));
    low = ptx::cvt_rna_tf32(__uint_as_float(bits) - __uint_as_float(high));
  }
  __device__ void load(const unsigned char* rows) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, rows);
#pragma unroll
    for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
  }
  __device__ void multiply(float (&acc)[4], uint32_t b0, uint32_t b1) const {
    uint32_t high0, high1, low0, low1;
    split(b0, high0, low0);
    split(b1, high1, low1);
    ptx::mma_m16n8k8_tf32(acc, low, high0, high1);
    ptx::mma_m16n8k8_tf32(acc, high, low0, low1);
    ptx::mma_m16n8k8_tf32(acc, high, high0, high1);
  }
};

// Adds the products of a warp's 16 rows with all columns of a tile, over the depth that the tiles hold.
template <class T>
__device__ __forceinline__ void multiply_tiles(unsigned char* row_tile, unsigned char* column_tile,
                                               float (&acc)[kTileColumns / 8][4]) {
  const int lane = lane_index();
  const int a_row = warp_index() * 16 + lane % 16, a_chunk = lane / 16;
  const int b_row = lane % 8 + lane / 16 * 8, b_chunk = lane / 8 % 2;
#pragma unroll(sizeof(T) == 4 ? 1 : 2)  // more would only take registers
  for (int chunk = 0; chunk < kTileChunks; chunk += 2) {
    Multiplier<T> rows;
    rows.load(tile_chunk(row_tile, a_row, chunk + a_chunk));
#pragma unroll
    for (int pair = 0; pair < kTileColumns / 16; ++pair) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, tile_chunk(column_tile, pair * 16 + b_row, chunk + b_chunk));
      rows.multiply(acc[2 * pair], b[0], b[1]);
      rows.multiply(acc[2 * pair + 1], b[2], b[3]);
    }
  }
}

// ---- the best column of each row ------------------------------------------------------------------------------------

// A lane's two rows of its warp's sixteen: lane / 4 and that + 8.
struct Best {
  float score[2];
  int column[2];

  __device__ void reset() {
    score[0] = score[1] = -kInfinity;
    column[0] = column[1] = -1;
  }
  // Columns come in ascending order, so that the lowest of equals stays; NaN is never greater.
  __device__ __forceinline__ void offer(int half, float s, int c) {
    if (s > score[half]) score[half] = s, column[half] = c;
  }
  // Agrees among the four lanes that share rows.
  __device__ void agree() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      for (int bit = 1; bit < 4; bit *= 2) {
        const float s = __shfl_xor_sync(kFullWarp, score[half], bit);
        const int c = __shfl_xor_sync(kFullWarp, column[half], bit);
        if (s > score[half] || (s == score[half] && unsigned(c) < unsigned(column[half])))
          score[half] = s, column[half] = c;
      }
    }
  }
};

// One pass of a block over all columns. Returns whether a row's size asks for the pass to be repeated with kScaled.
template <class T, int kWarps, bool kScaled>
__device__ bool sweep_columns(const RowList<T>& rows, int row_begin, const RowList<T>& columns,
                              const Candidates& candidates, const SweepShape& shape, unsigned char* shared,
                              Best& best) {
  constexpr int kRows = kWarps * 16, kThreads = kWarps * kWarpSize;
  constexpr int kDepth = kTileRowBytes / int(sizeof(T));
  const int chunks = shape.chunks, stages = (columns.tokens.count + kTileColumns - 1) / kTileColumns * chunks;
  const bool resident = shape.row_slots == chunks;

  // Shared memory: row tiles (all of the depth if it fits, else two in turn), two column tiles, and the factors that
  // turn dot products into scores.
  SharedMemory memory(shared);
  auto* const row_tiles = memory.take<unsigned char>(shape.row_slots * kRows * kTileRowBytes, "row_tiles");
  auto* const column_tiles = memory.take<unsigned char>(2 * kTileColumns * kTileRowBytes, "column_tiles");
  float* const row_factor = memory.take<float>(kRows, "row_factor");
  float* const column_factor = memory.take<float>(2 * kTileColumns, "column_factor");

  TileCarrier<T, kRows, kThreads, kScaled> row_carrier;
  TileCarrier<T, kTileColumns, kThreads, kScaled> column_carrier;
  row_carrier.aim(rows, row_begin, shape.width);
  column_carrier.aim(columns, 0, shape.width);
  row_carrier.depart(rows, 0, shape, row_tiles);
  column_carrier.depart(columns, 0, shape, column_tiles);

  float acc[kTileColumns / 8][4];
  bool unsafe = false;
  best.reset();
  for (int stage = 0, tile = 0, chunk = 0; stage < stages; ++stage) {
    // What was sent for in the stage before is here.
    unsigned char* const row_tile = row_tiles + (resident ? chunk : stage % 2) * kRows * kTileRowBytes;
    unsigned char* const column_tile = column_tiles + stage % 2 * kTileColumns * kTileRowBytes;
    float* const factors = column_factor + tile % 2 * kTileColumns;
    ptx::cp_async_wait_all();
    if (tile == 0 || !resident) row_carrier.measure(row_tile);
    column_carrier.measure(column_tile);
    if (chunk == chunks - 1) {
      if (tile == 0)
        unsafe |= row_carrier.finish(rows, shape.width, [&](int i, float squares, float scale) {
          row_factor[i] = shape.cosine ? inverse_norm(squares, scale) : 1.0f;
        });
      unsafe |= column_carrier.finish(columns, shape.width, [&](int i, float squares, float scale) {
        const int column = tile * kTileColumns + i;
        const bool allowed = column < columns.tokens.count && candidates.allow(columns.tokens, column);
        factors[i] = !allowed ? kNoNumber : shape.cosine ? inverse_norm(squares, scale) : 1.0f;
      });
    }
    __syncthreads();

    // The next stage's tiles travel while this one's are multiplied, to slots that were last read before the barrier.
    const int next_chunk = chunk + 1 < chunks ? chunk + 1 : 0;
    if (stage + 1 < stages) {
      const int depth = next_chunk * kDepth, next = (stage + 1) % 2;
      if (next_chunk == 0) column_carrier.aim(columns, (tile + 1) * kTileColumns, shape.width);
      column_carrier.depart(columns, depth, shape, column_tiles + next * kTileColumns * kTileRowBytes);
      if (!resident || (tile == 0 && next_chunk > 0))
        row_carrier.depart(rows, depth, shape, row_tiles + (resident ? next_chunk : next) * kRows * kTileRowBytes);
    }
    if (chunk == 0) {
#pragma unroll
      for (int i = 0; i < kTileColumns / 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0;
    }
    multiply_tiles<T>(row_tile, column_tile, acc);

    // Scores, offered in ascending column order.
    if (chunk == chunks - 1) {
      const int row = warp_index() * 16 + lane_index() / 4;
      const float upper = row_factor[row], lower = row_factor[row + 8];
#pragma unroll
      for (int i = 0; i < kTileColumns / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = i * 8 + lane_index() % 4 * 2 + j;
          best.offer(0, acc[i][j] * upper * factors[column], tile * kTileColumns + column);
          best.offer(1, acc[i][2 + j] * lower * factors[column], tile * kTileColumns + column);
        }
      }
    }
    tile += next_chunk == 0;
    chunk = next_chunk;
  }
  return unsafe && shape.cosine;
}

// The best column of each of the block's rows, the same in the four lanes that share rows; -inf and -1 if none
// compares. Ends with a barrier: shared memory is free for other use.
template <class T, int kWarps>
__device__ void find_best(const RowList<T>& rows, int row_begin, const RowList<T>& columns,
                          const Candidates& candidates, const SweepShape& shape, unsigned char* shared, Best& best) {
  const bool unsafe = sweep_columns<T, kWarps, false>(rows, row_begin, columns, candidates, shape, shared, best);
  const bool repeat = __syncthreads_or(unsafe) != 0;
  if constexpr (!std::is_same_v<T, f16>) {
    if (repeat) {
      sweep_columns<T, kWarps, true>(rows, row_begin, columns, candidates, shape, shared, best);
      __syncthreads();
    }
  }
  best.agree();
}

}  // namespace fastok::cuda
