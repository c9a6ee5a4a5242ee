// select_tokens on CUDA. A head of few tokens is one block's work. Of the others each block has a tile: the highest
// digits of all keys tell where the cut lies; tokens with this digit are the candidates, among which the last block
// finds the cut itself; then every block writes what its tile has before it. Torch-free.
#pragma once
#include "common/integers.cuh"
#include "select/select_kernel.cuh"
#include "sparse/select_tokens_plan.h"

namespace fastok::cuda {

struct SelectParams {
  const float* scores;  // [B, heads, T]; tokens are contiguous
  int64_t batch_stride, head_stride;
  bool aligned;      // all rows begin at multiples of 16 bytes
  Integers lengths;  // [B]
  int heads, tokens, k, sink, recent;
  double mass;     // 0: none
  int64_t* index;  // [B, heads, k]
  int64_t* count;  // [B, heads]

  // Working memory of tiles.
  int tiles;
  int* digits;           // [rows, kDigits], zeroed
  int* tickets;          // [rows, 2], zeroed
  int* states;           // [rows, kHeadState]
  int *taken, *begins;   // [rows, tiles]: tokens taken, later of all tiles before; the same of candidates
  int* counts;           // [rows, tiles]: candidates
  uint64_t* candidates;  // [rows, T]: those of each tile from where it begins, ordered(key, token)
};

// A head's tokens: [0, sink) and [end, length) are taken whatever they score, `free` of the others.
struct SelectRow {
  const float* score;
  int length, sink, end, free;
  bool aligned;

  __device__ SelectRow(const SelectParams& p, int row)
      : score(p.scores + row / p.heads * p.batch_stride + row % p.heads * p.head_stride),
        length(p.lengths.length(row / p.heads, p.tokens)),
        aligned(p.aligned) {
    sink = min(p.sink, length), end = max(length - p.recent, sink);
    free = min(p.k - (sink + length - end), end - sink);
  }
  __device__ bool competes(int i) const { return i >= sink && i < end; }
  __device__ bool forced(int i) const { return i < sink || (i >= end && i < length); }
  // NaN counts as the lowest score.
  __device__ static uint32_t key_of(float x) { return descending_key(isnan(x) ? -__builtin_huge_valf() : x); }
  __device__ uint32_t key(int i) const { return key_of(score[i]); }
  // Of the four tokens from i on.
  __device__ void keys(int i, uint32_t (&key)[4]) const {
    if (aligned && i + 4 <= length) {
      const auto four = *reinterpret_cast<const Pack<float, 4>*>(score + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) key[j] = key_of(four.at[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) key[j] = i + j < length ? key_of(score[i + j]) : 0xffffffffu;
    }
  }
};

// Writes which of the block's tile of tokens are taken, from place `begin` on; returns how many.
__device__ inline int write_tile(const SelectRow& row, const Cut& cut, int tile, int64_t* index, int begin,
                                 int* scratch) {
  const int first = tile * kSelectTile + int(threadIdx.x) * 4;
  uint32_t key[4];
  row.keys(first, key);
  bool taken[4];
  int own = 0, total;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int i = first + j;
    taken[j] = row.forced(i) || (row.competes(i) && cut.take(key[j], i));
    own += taken[j];
  }
  int place = begin + block_exclusive_sum(own, scratch, total);
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (taken[j]) index[place++] = first + j;
  return total;
}

// ---- a share of the sum ---------------------------------------------------------------------------------------------

// Scores as whole numbers, so that sums of any order are the same: in units as fine as a sum below 2^63 allows, 2^-45
// of the largest score for 65536 tokens.
struct Shares {
  double unit;

  __device__ static float positive(float x) { return x > 0 ? fminf(x, 3.402823466e38f) : 0.0f; }
  __device__ Shares(float largest, int tokens) {
    const int exponent = int(__float_as_uint(largest) >> 23) - 126;  // largest < 2^exponent
    unit = ldexp(1.0, 62 - (tokens > 1 ? 32 - __clz(tokens - 1) : 0) - exponent);
  }
  __device__ unsigned long long of(float x) const { return static_cast<unsigned long long>(positive(x) * unit); }
};

// The fewest competing tokens, best first, that with the forced ones reach the share. For all threads of the block.
__device__ inline int tokens_for_mass(const SelectRow& row, double mass, SharedMemory& memory,
                                      const CutMemory& cut_memory) {
  using Sum = unsigned long long;
  auto* const sums = memory.take<Sum>(kDigits, "sums");
  auto* const scratch = memory.take<Sum>(32, "sum_scratch");
  auto* const found = memory.take<Sum>(4, "sum_found");
  const int thread = int(threadIdx.x), threads = int(blockDim.x);

  // The largest, then the sums of all and of the forced ones.
  for (int i = thread; i < 4; i += threads) cut_memory.found[i] = 0;
  __syncthreads();
  unsigned largest = 0;
  for (int i = thread; i < row.length; i += threads)
    largest = max(largest, __float_as_uint(Shares::positive(row.score[i])));
  atomicMax(reinterpret_cast<unsigned*>(cut_memory.found), largest);
  __syncthreads();
  const Shares shares(__uint_as_float(unsigned(cut_memory.found[0])), row.length);
  Sum own_forced = 0, own = 0, before, total;
  for (int i = thread; i < row.length; i += threads) {
    const Sum share = shares.of(row.score[i]);
    own += share, own_forced += row.forced(i) ? share : 0;
  }
  block_exclusive_sum(own_forced, scratch, before);
  block_exclusive_sum(own, scratch, total);
  const double target = mass * double(total);
  if (!(double(before) < target)) return 0;  // the whole block knows

  uint32_t prefix = 0, high = 0;
  int chosen = 0;
  Sum each = 0, equal = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, count = pass < 2 ? kDigits : kDigits / 2;
    for (int i = thread; i < count; i += threads) cut_memory.digits[i] = 0, sums[i] = 0;
    __syncthreads();
    for (int i = row.sink + thread; i < row.end; i += threads) {
      const uint32_t key = row.key(i);
      if (((key ^ prefix) & high) != 0) continue;
      const int digit = int(key >> shift) & (count - 1);
      atomicAdd(&cut_memory.digits[digit], 1);
      atomicAdd(&sums[digit], shares.of(row.score[i]));
    }
    __syncthreads();
    // The digit within which the share is reached.
    const int own_digits = count / threads > 0 ? count / threads : 1, end = min((thread + 1) * own_digits, count);
    Sum sum = 0, all;
    int tokens = 0, all_tokens;
    for (int d = thread * own_digits; d < end; ++d) sum += sums[d], tokens += cut_memory.digits[d];
    Sum reached = before + block_exclusive_sum(sum, scratch, all);
    int passed = chosen + block_exclusive_sum(tokens, cut_memory.scratch, all_tokens);
    if (double(reached) < target && !(double(reached + sum) < target)) {
      int d = thread * own_digits;
      for (; double(reached + sums[d]) < target; ++d) reached += sums[d], passed += cut_memory.digits[d];
      found[0] = Sum(d), found[1] = reached, found[2] = sums[d], found[3] = Sum(passed);
      cut_memory.found[0] = cut_memory.digits[d];
    }
    __syncthreads();
    prefix |= uint32_t(found[0]) << shift;
    high |= uint32_t(count - 1) << shift;
    before = found[1], each = found[2], chosen = int(found[3]), equal = Sum(cut_memory.found[0]);
    __syncthreads();
  }
  // Of equal tokens, as few as will do.
  each /= equal;
  Sum low = 1;
  while (low < equal) {
    const Sum middle = (low + equal) / 2;
    if (double(before + middle * each) < target) {
      low = middle + 1;
    } else {
      equal = middle;
    }
  }
  return chosen + int(low);
}

// Grid: one block per head.
template <bool kByMass>
__global__ void __launch_bounds__(kSelectThreads, 1) select_row_kernel(const SelectParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const CutMemory cut_memory(memory);
  const int number = int(blockIdx.x);
  const SelectRow row(p, number);
  int free = row.free;
  if constexpr (kByMass) {
    const int enough = tokens_for_mass(row, p.mass, memory, cut_memory);
    free = min(free, enough);
    __syncthreads();
  }
  Cut cut{0, -1, 0};
  if (free > 0) {
    const auto key_of = [&](int i, uint32_t& key) {
      key = row.key(i);
      return true;
    };
    cut = find_cut(row.sink, row.end, free, key_of, cut_memory);
  }
  int64_t* const index = p.index + int64_t(number) * p.k;
  int written = 0;
  for (int tile = 0; tile * kSelectTile < row.length; ++tile)
    written += write_tile(row, cut, tile, index, written, cut_memory.scratch);
  for (int i = written + int(threadIdx.x); i < p.k; i += int(blockDim.x)) index[i] = -1;
  if (threadIdx.x == 0) p.count[number] = written;
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

// Whether this is the last block of a head to get here. What the others wrote may be read by __ldcg.
__device__ inline bool comes_last(int* ticket, int blocks) {
  __syncthreads();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1) == blocks - 1;
    __threadfence();
  }
  return __syncthreads_or(last) != 0;
}

// Grid: a block per tile of each head. Counts the highest digits; the last block finds where the cut lies.
__global__ void __launch_bounds__(kSelectThreads, 1) first_digit_kernel(const SelectParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const CutMemory cut_memory(memory);
  const int number = int(blockIdx.x / unsigned(p.tiles)), tile = int(blockIdx.x % unsigned(p.tiles));
  const SelectRow row(p, number);
  const int thread = int(threadIdx.x), first = tile * kSelectTile + thread * 4;
  int* const digits = p.digits + int64_t(number) * kDigits;
  const bool searches = row.free > 0 && row.free < row.end - row.sink;
  if (searches && tile * kSelectTile < row.end) {
    for (int d = thread; d < kDigits; d += kSelectThreads) cut_memory.digits[d] = 0;
    __syncthreads();
    uint32_t key[4];
    row.keys(first, key);
#pragma unroll
    for (int j = 0; j < 4; ++j) count_digit(cut_memory.digits, row.competes(first + j), int(key[j] >> 21));
    __syncthreads();
    for (int d = thread; d < kDigits; d += kSelectThreads)
      if (cut_memory.digits[d] > 0) atomicAdd(&digits[d], cut_memory.digits[d]);
  }
  if (!comes_last(p.tickets + 2 * number, p.tiles)) return;
  if (searches) {
    for (int d = thread; d < kDigits; d += kSelectThreads) cut_memory.digits[d] = __ldcg(digits + d);
    __syncthreads();
    find_digit(kDigits, row.free, cut_memory);
  }
  if (thread == 0) {
    // All below the digit are taken, and of those that have it so many.
    int* const state = p.states + int64_t(number) * kHeadState;
    state[0] = searches ? cut_memory.found[0] : row.free > 0 ? kDigits : -1;
    state[1] = searches ? cut_memory.found[1] : 0;
  }
}

// Grid: the same. Puts the candidates together; the last block finds the cut, and where each tile begins.
__global__ void __launch_bounds__(kSelectThreads, 1) collect_kernel(const SelectParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const CutMemory cut_memory(memory);
  uint32_t* const cached = memory.take<uint32_t>(kCachedKeys, "cached");
  const int number = int(blockIdx.x / unsigned(p.tiles)), tile = int(blockIdx.x % unsigned(p.tiles));
  const SelectRow row(p, number);
  const int thread = int(threadIdx.x), first = tile * kSelectTile + thread * 4;
  int* const state = p.states + int64_t(number) * kHeadState;
  int *const taken = p.taken + int64_t(number) * p.tiles, *const begins = p.begins + int64_t(number) * p.tiles;
  int* const counts = p.counts + int64_t(number) * p.tiles;
  uint64_t* const candidates = p.candidates + int64_t(number) * p.tokens;
  const int digit = state[0], wanted = state[1];
  {
    uint32_t key[4];
    row.keys(first, key);
    bool may[4];
    int own = 0, total;  // candidates in the lower half, tokens that are taken in the upper
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = first + j, high = int(key[j] >> 21);
      may[j] = row.competes(i) && high == digit;
      own += may[j] ? 1 : row.forced(i) || (row.competes(i) && high < digit) ? 1 << 16 : 0;
    }
    int place = block_exclusive_sum(own, cut_memory.scratch, total) & 0xffff;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (may[j]) candidates[tile * kSelectTile + place++] = ordered(key[j], first + j);
    if (thread == 0) counts[tile] = total & 0xffff, taken[tile] = total >> 16;
  }
  if (!comes_last(p.tickets + 2 * number + 1, p.tiles)) return;

  // Candidates in the order of their tokens: number i is the tile's i - begins[tile]-th.
  int candidate_count = 0;
  for (int base = 0; base < p.tiles; base += kSelectThreads) {
    const int t = base + thread;
    int total;
    const int before = block_exclusive_sum(t < p.tiles ? __ldcg(counts + t) : 0, cut_memory.scratch, total);
    if (t < p.tiles) begins[t] = candidate_count + before;
    candidate_count += total;
  }
  __syncthreads();
  const auto candidate = [&](int i) {
    int low = 0, high = p.tiles - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (begins[middle] <= i) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return __ldcg(candidates + low * kSelectTile + i - begins[low]);
  };
  for (int i = thread; i < min(candidate_count, kCachedKeys); i += kSelectThreads)
    cached[i] = uint32_t(candidate(i) >> 32);
  __syncthreads();
  Cut cut{digit == kDigits ? 0xffffffffu : 0, -1, 0};  // where there are no candidates: all or none
  if (wanted > 0) {
    const auto key_of = [&](int i, uint32_t& key) {
      key = i < kCachedKeys ? cached[i] : uint32_t(candidate(i) >> 32);
      return true;
    };
    cut = find_cut(0, candidate_count, wanted, key_of, cut_memory);
    if (cut.last < 0) cut.key = uint32_t(digit + 1) << 21;  // all candidates, but none of what comes behind them
  }

  // A warp adds up what is taken of a tile's candidates.
  for (int t = warp_index(); t < p.tiles; t += kSelectThreads / kWarpSize) {
    const int count = __ldcg(counts + t);
    int own = 0;
    for (int i = lane_index(); i < count; i += kWarpSize) {
      const uint32_t key = uint32_t(__ldcg(candidates + t * kSelectTile + i) >> 32);
      own += wanted > 0 && cut.take(key, begins[t] + i);
    }
    own = __reduce_add_sync(kFullWarp, own);
    if (lane_index() == 0) taken[t] = __ldcg(taken + t) + own;
  }
  // From here on the cut is one of tokens.
  if (thread == 0) {
    state[2] = int(cut.key);
    state[3] = cut.last < 0 ? -1 : cut.last < candidate_count ? int(uint32_t(candidate(cut.last))) : p.tokens;
  }
  __syncthreads();
  int written = 0;
  for (int base = 0; base < p.tiles; base += kSelectThreads) {
    const int t = base + thread, own = t < p.tiles ? taken[t] : 0;
    int total;
    const int before = block_exclusive_sum(own, cut_memory.scratch, total);
    if (t < p.tiles) taken[t] = written + before;
    written += total;
  }
  if (thread == 0) p.count[number] = written;
}

// Grid: the same. Writes the tokens, and -1 behind them.
__global__ void __launch_bounds__(kSelectThreads, 1) write_kernel(const SelectParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  int* const scratch = memory.take<int>(32, "scratch");
  const int number = int(blockIdx.x / unsigned(p.tiles)), tile = int(blockIdx.x % unsigned(p.tiles));
  const SelectRow row(p, number);
  const int* const state = p.states + int64_t(number) * kHeadState;
  int64_t* const index = p.index + int64_t(number) * p.k;
  const Cut cut{uint32_t(state[2]), state[3], 0};
  if (tile * kSelectTile < row.length)
    write_tile(row, cut, tile, index, p.taken[int64_t(number) * p.tiles + tile], scratch);
  const int written = int(p.count[number]), step = p.tiles * kSelectThreads;
  for (int i = written + tile * kSelectThreads + int(threadIdx.x); i < p.k; i += step) index[i] = -1;
}

}  // namespace fastok::cuda
