// top_tokens and sample_cdf on CUDA: a block per row. Keys are made of the scores whenever they are read. Torch-free.
#pragma once
#include "common/order.cuh"
#include "select/select_plan.h"

namespace fastok::cuda {

// Sort keys behind those of all scores: NaN, and tokens that may not be chosen.
constexpr uint32_t kKeyNoNumber = 0xfffffffdu, kKeyForbidden = 0xfffffffeu;

// ---- selection by radix ---------------------------------------------------------------------------------------------

// Which tokens are taken: those with a key below `key`, and with an equal one up to token `last`.
struct Cut {
  uint32_t key;
  int last;
  int count;  // how many that is

  __device__ bool take(uint32_t other, int i) const { return other < key || (other == key && i <= last); }
};

struct CutMemory {
  int* digits;   // kDigits
  int* scratch;  // one int per warp
  int* found;    // 4

  __device__ explicit CutMemory(SharedMemory& memory)
      : digits(memory.take<int>(kDigits, "digits")),
        scratch(memory.take<int>(32, "scratch")),
        found(memory.take<int>(4, "found")) {}
};

// Adds the digits of a warp's lanes. Lanes that share one digit, as all do where scores are equal, take turns as one.
__device__ inline void count_digit(int* digits, bool counts, int digit) {
  const unsigned lanes = __ballot_sync(kFullWarp, counts);
  if (lanes == 0) return;
  const int first = __ffs(int(lanes)) - 1;
  const int common = __shfl_sync(kFullWarp, digit, first);
  if (__all_sync(kFullWarp, !counts || digit == common)) {
    if (lane_index() == first) atomicAdd(&digits[digit], __popc(lanes));
  } else if (counts) {
    atomicAdd(&digits[digit], 1);
  }
}

// Leaves in `found` the digit of the wanted-th lowest of all counted keys, which it is of those with this digit, and
// how many these are; returns how many were counted, and finds nothing if there are less. For all threads of the block.
__device__ inline int find_digit(int count, int wanted, const CutMemory& memory) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  // Each thread adds up a few neighbouring digits; the one where the key lies looks closer.
  const int own = count / threads > 0 ? count / threads : 1;
  int sum = 0, total;
  for (int d = thread * own; d < min((thread + 1) * own, count); ++d) sum += memory.digits[d];
  const int before = block_exclusive_sum(sum, memory.scratch, total);
  if (before < wanted && wanted <= before + sum) {
    int left = wanted - before, d = thread * own;
    while (left > memory.digits[d]) left -= memory.digits[d++];
    memory.found[0] = d, memory.found[1] = left, memory.found[2] = memory.digits[d];
  }
  __syncthreads();
  return total;
}

// The k lowest keys of tokens [begin, end), equal ones by index; fewer if there are not as many. `key_of(i, key)` tells
// whether token i takes part. For all threads of the block.
template <class KeyOf>
__device__ Cut find_cut(int begin, int end, int k, const KeyOf& key_of, const CutMemory& memory) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  uint32_t prefix = 0, high = 0;
  int wanted = k, equal = 0;
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, count = pass < 2 ? kDigits : kDigits / 2;
    for (int i = thread; i < count; i += threads) memory.digits[i] = 0;
    __syncthreads();
    for (int base = begin; base < end; base += threads) {
      const int i = base + thread;
      uint32_t key = 0;
      const bool counts = i < end && key_of(i, key) && ((key ^ prefix) & high) == 0;
      count_digit(memory.digits, counts, int(key >> shift) & (count - 1));
    }
    __syncthreads();
    const int total = find_digit(count, wanted, memory);
    if (pass == 0 && total <= k) return {0xffffffffu, -1, total};  // the whole block knows
    prefix |= uint32_t(memory.found[0]) << shift;
    high |= uint32_t(count - 1) << shift;
    wanted = memory.found[1], equal = memory.found[2];
  }
  if (wanted == equal) return {prefix, end, k};

  // Of the equal ones, the first `wanted`.
  __syncthreads();
  for (int base = begin, carry = 0; base < end && carry < wanted; base += threads) {
    const int i = base + thread;
    uint32_t key = 0;
    const bool same = i < end && key_of(i, key) && key == prefix;
    int total;
    const int before = carry + block_exclusive_sum(same, memory.scratch, total);
    if (same && before + 1 == wanted) memory.found[3] = i;
    carry += total;
  }
  __syncthreads();
  const int last = memory.found[3];
  __syncthreads();
  return {prefix, last, k};
}

// ---- top_tokens -----------------------------------------------------------------------------------------------------

struct TopParams {
  const void* scores;
  int64_t batch_stride, stride;
  const bool* mask;  // nullptr: all
  int64_t mask_batch_stride, mask_stride;
  const int64_t* segments;  // nullptr: all tokens are one
  int64_t segment_batch_stride, segment_stride;
  int n, protect, total, n_segments;
  bool by_score;
  int sort_width;
  Cut* cuts;       // [B, n_segments]; nullptr without segments
  int64_t* picks;  // [B, total], where they are put in order by counting; else nullptr
  int64_t* out;    // [B, protect + total]

  // A token's key; those of no segment may not be chosen.
  template <class T>
  __device__ uint32_t key(int64_t b, int i) const {
    if (mask && !mask[b * mask_batch_stride + i * mask_stride]) return kKeyForbidden;
    if (segments && (segment(b, i) < 0 || segment(b, i) >= n_segments)) return kKeyForbidden;
    const float score = widen(static_cast<const T*>(scores)[b * batch_stride + i * stride]);
    return isnan(score) ? kKeyNoNumber : descending_key(score);
  }
  __device__ int64_t segment(int64_t b, int i) const { return segments[b * segment_batch_stride + i * segment_stride]; }
};

struct Budgets {
  int first, count;
  int k[kBudgets];
};

// Grid: a block for each of `count` segments of each sample.
template <class T>
__global__ void __launch_bounds__(1024, 1) cut_kernel(const TopParams p, const Budgets budgets) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const CutMemory cut_memory(memory);
  const int64_t b = blockIdx.x / unsigned(budgets.count);
  const int place = int(blockIdx.x % unsigned(budgets.count)), segment = budgets.first + place, k = budgets.k[place];
  Cut cut{0, -1, 0};
  if (k > 0) {
    const auto key_of = [&](int i, uint32_t& key) {
      key = p.key<T>(b, i);
      return key < kKeyNoNumber && p.segment(b, i) == segment;
    };
    cut = find_cut(p.protect, p.n, k, key_of, cut_memory);
  }
  if (threadIdx.x == 0) p.cuts[b * p.n_segments + segment] = cut;
}

// Whether a token is among its segment's best.
__device__ inline bool chosen_in_segment(const TopParams& p, int64_t b, int i, uint32_t key) {
  return p.segments && key < kKeyNoNumber && p.cuts[b * p.n_segments + p.segment(b, i)].take(key, i);
}

// The cut that makes up the number from the tokens that no segment chose.
template <class T>
__device__ Cut find_rest(const TopParams& p, int64_t b, const CutMemory& memory) {
  int chosen = 0, all;
  for (int s = int(threadIdx.x); s < p.n_segments; s += int(blockDim.x)) chosen += p.cuts[b * p.n_segments + s].count;
  block_exclusive_sum(chosen, memory.scratch, all);
  if (all == p.total) return {0, -1, 0};
  const auto key_of = [&](int i, uint32_t& key) {
    key = p.key<T>(b, i);
    return !chosen_in_segment(p, b, i, key);
  };
  return find_cut(p.protect, p.n, p.total - all, key_of, memory);
}

// Grid: one block per sample.
template <class T>
__global__ void __launch_bounds__(1024, 1) top_kernel(const TopParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const CutMemory cut_memory(memory);
  uint64_t* const order = memory.take<uint64_t>(p.sort_width, "order");
  const int64_t b = blockIdx.x;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  int64_t* const out = p.out + b * (p.protect + p.total);
  for (int i = thread; i < p.protect; i += threads) out[i] = i;
  if (p.total == 0) return;

  const auto key_of = [&](int i, uint32_t& key) {
    key = p.key<T>(b, i);
    return true;
  };
  const Cut cut = p.segments ? find_rest<T>(p, b, cut_memory) : find_cut(p.protect, p.n, p.total, key_of, cut_memory);
  int64_t* const picks = p.picks ? p.picks + b * p.total : out + p.protect;
  for (int base = p.protect, written = 0; written < p.total; base += threads) {
    const int i = base + thread;
    const uint32_t key = i < p.n ? p.key<T>(b, i) : 0;
    const bool taken = i < p.n && (cut.take(key, i) || chosen_in_segment(p, b, i, key));
    int total;
    const int place = written + block_exclusive_sum(taken, cut_memory.scratch, total);
    if (taken && p.sort_width > 0) {
      order[place] = ordered(key, i);
    } else if (taken) {
      picks[place] = i;
    }
    written += total;
  }
  if (p.sort_width == 0) return;
  for (int i = p.total + thread; i < p.sort_width; i += threads) order[i] = ~uint64_t(0);
  __syncthreads();
  sort_in_block(order, p.sort_width);
  for (int i = thread; i < p.total; i += threads) out[p.protect + i] = int64_t(uint32_t(order[i]));
}

// Grid: place_blocks blocks per sample, a pick per thread: puts more picks in order of score than a block can sort.
template <class T>
__global__ void __launch_bounds__(kPlaceThreads) place_kernel(const TopParams p, int place_blocks) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  uint64_t* const tile = memory.take<uint64_t>(kPlaceTile, "tile");
  const int64_t b = blockIdx.x / unsigned(place_blocks);
  const int own = int(blockIdx.x % unsigned(place_blocks)) * kPlaceThreads + int(threadIdx.x);
  const int64_t* const picks = p.picks + b * p.total;
  const auto order_of = [&](int place) {
    const int i = int(picks[place]);
    return ordered(p.key<T>(b, i), i);
  };
  const uint64_t mine = own < p.total ? order_of(own) : 0;
  int before = 0;
  for (int begin = 0; begin < p.total; begin += kPlaceTile) {
    const int count = min(kPlaceTile, p.total - begin);
    __syncthreads();
    for (int j = int(threadIdx.x); j < count; j += kPlaceThreads) tile[j] = order_of(begin + j);
    __syncthreads();
    for (int j = 0; j < count; ++j) before += tile[j] < mine;
  }
  if (own < p.total) p.out[b * (p.protect + p.total) + p.protect + before] = int64_t(uint32_t(mine));
}

// ---- sample_cdf -----------------------------------------------------------------------------------------------------

struct SampleParams {
  const void* scores;
  int64_t batch_stride, stride;
  int n, n_out, protect, sort_width;
  int64_t heights;
  uint64_t* order;  // [B, sort_width] and
  double* total;    // [B, sort_width], where shared memory is too small; else nullptr
  int32_t *assign, *counts, *offsets, *members;
};

// Inclusive sums by doubling, in the order that all backends add in. A block works downwards, so that what a step reads
// was written by none of its own additions.
__device__ inline void prefix_sums_in_block(double* x, int n) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  for (int step = 1; step < n; step *= 2) {
    for (int base = (n - 1) / threads * threads; base >= 0; base -= threads) {
      const int i = base + thread;
      const bool adds = i >= step && i < n;
      const double sum = adds ? x[i] + x[i - step] : 0;
      __syncthreads();
      if (adds) x[i] = sum;
    }
    __syncthreads();
  }
}

// The first of n ascending sums that is at least (or, if `above`, more than) `height`; n if there is none.
__device__ inline int first_from(const double* total, int n, double height, bool above) {
  int low = 0, high = n;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (total[middle] < height || (above && total[middle] == height)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// `count` evenly spaced heights. They ascend, and so do the ranks that they are nearest to.
struct Heights {
  double low, high;
  int64_t count;

  __device__ double at(int64_t step) const {
    return low + (high - low) * double(step) / double(count > 1 ? count - 1 : 1);
  }
  // Whether a height is nearer to the sum of `rank` (or to a later one) than to the one before.
  __device__ static bool reaches(const double* total, int rank, double height) {
    return rank == 0 || height - total[rank - 1] > total[rank] - height;
  }
  // Whether `rank` is the nearest of any: the first that reaches it does not reach the next one.
  __device__ bool any_of(const double* total, int ranks, int rank) const {
    int64_t first = 0, end = count;
    while (first < end) {
      const int64_t middle = first + (end - first) / 2;
      if (reaches(total, rank, at(middle))) {
        end = middle;
      } else {
        first = middle + 1;
      }
    }
    return first < count && (rank + 1 == ranks || !reaches(total, rank + 1, at(first)));
  }
};

// Grid: one block per sample.
template <class T>
__global__ void __launch_bounds__(1024, 1) sample_kernel(const SampleParams p) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  const int64_t b = blockIdx.x;
  const int thread = int(threadIdx.x), threads = int(blockDim.x), words = (p.sort_width + 31) / 32;
  int* const scratch = memory.take<int>(32, "scratch");
  uint32_t* const bits = memory.take<uint32_t>(words, "bits");
  int* const before = memory.take<int>(words, "before");
  uint64_t* const order = p.order ? p.order + b * p.sort_width : memory.take<uint64_t>(p.sort_width, "order");
  double* const total = p.total ? p.total + b * p.sort_width : memory.take<double>(p.sort_width, "total");
  const T* const scores = static_cast<const T*>(p.scores) + b * p.batch_stride;
  int32_t *const assign = p.assign + b * p.n, *const members = p.members + b * p.n;

  // Tokens by ascending significance; below 0 counts as 0, infinite as the largest float, NaN not at all.
  constexpr uint32_t kZero = 0x7fffffffu, kLargest = 0x00800000u;
  int counted = 0, ranks;
  for (int j = thread; j < p.sort_width; j += threads) {
    const int i = p.protect + j;
    uint64_t key = ~uint64_t(0);
    if (i < p.n) {
      const float score = widen(scores[i * p.stride]);
      if (!isnan(score)) key = ordered(~min(max(descending_key(score), kLargest), kZero), i);
      counted += !isnan(score);
    }
    order[j] = key;
  }
  for (int w = thread; w < words; w += threads) bits[w] = 0;
  block_exclusive_sum(counted, scratch, ranks);
  __syncthreads();
  sort_in_block(order, p.sort_width);
  for (int i = thread; i < ranks; i += threads)
    total[i] = double(__uint_as_float(uint32_t(order[i] >> 32) & 0x7fffffffu));
  __syncthreads();
  prefix_sums_in_block(total, ranks);
  const double least = ranks > 0 ? total[0] : 0, most = ranks > 0 ? total[ranks - 1] - least : 0;
  __syncthreads();
  for (int i = thread; i < ranks; i += threads) total[i] = most == 0 ? double(i) : total[i] - least;
  __syncthreads();

  // The ranks nearest to the heights.
  if (ranks > 0) {
    const Heights heights{total[min(first_from(total, ranks, 0.0, true), ranks - 1)], total[ranks - 1], p.heights};
    if (p.heights <= ranks) {
      for (int step = thread; step < int(p.heights); step += threads) {
        const double height = heights.at(step);
        const int upper = min(first_from(total, ranks, height, false), ranks - 1), lower = max(upper - 1, 0);
        const int pick = height - total[lower] <= total[upper] - height ? lower : upper;
        atomicOr(&bits[pick / 32], 1u << (pick % 32));
      }
    } else {
      for (int rank = thread; rank < ranks; rank += threads)
        if (heights.any_of(total, ranks, rank)) atomicOr(&bits[rank / 32], 1u << (rank % 32));
    }
  }
  __syncthreads();
  int used = p.protect;
  for (int base = 0; base < words; base += threads) {
    const int w = base + thread;
    int sum;
    const int place = block_exclusive_sum(w < words ? __popc(bits[w]) : 0, scratch, sum);
    if (w < words) before[w] = used + place;
    used += sum;
  }
  __syncthreads();

  // The map.
  if (thread == 0) p.counts[b] = used;
  for (int s = thread; s <= p.n_out; s += threads) p.offsets[b * (p.n_out + 1) + s] = min(s, used);
  for (int i = thread; i < p.n; i += threads) {
    if (i < p.protect) assign[i] = members[i] = i;
    if (i >= used) members[i] = -1;
    if (i >= p.protect && isnan(widen(scores[i * p.stride]))) assign[i] = -1;
  }
  for (int i = thread; i < ranks; i += threads) {
    const int token = int(uint32_t(order[i]));
    const uint32_t word = bits[i / 32], bit = 1u << (i % 32);
    const int slot = before[i / 32] + __popc(word & (bit - 1));
    assign[token] = word & bit ? slot : -1;
    if (word & bit) members[slot] = token;
  }
}

}  // namespace fastok::cuda
