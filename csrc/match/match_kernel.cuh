// bipartite_match on CUDA: match_kernel finds each source's best destination and, up to kFusedTokens tokens, also
// selects the r best sources and builds the map; for more tokens rank_kernel and slot_kernel do that. There is no
// memory but the results: until the map is built, `members` holds the sources' sort keys and `assign` their mates.
#pragma once
#include "common/order.cuh"
#include "match/match_tile.cuh"
#include "merge/csr.cuh"

namespace fastok::cuda {

// Positions of a whole batch; nullptr means first, first + step, ...
struct BatchPositions {
  const int64_t* data;
  int64_t batch_stride;
  int first, step, count;

  __device__ TokenList sample(int64_t b) const {
    return {data ? data + b * batch_stride : nullptr, first, step, count};
  }
};

struct MatchParams {
  const void* metric;
  int64_t batch_stride, row_stride;
  BatchPositions src, dst;
  const float* bias;  // nullptr: none
  int64_t bias_batch_stride, bias_stride;
  int n, n_out, r, protect;
  bool by_threshold, sorted_order;
  float threshold;

  int row_tiles, sort_width, order_words;
  bool fused;
  SweepShape shape;
  CsrPlan csr;

  int32_t *assign, *counts, *offsets, *members;

  // With bias, sources above the threshold need not be the first in order.
  __device__ bool ranks_differ() const { return by_threshold && bias; }
};

// ---- a source's choice ----------------------------------------------------------------------------------------------

// Sort keys: ascending from the best score; then sources without one, then those that may not merge.
constexpr uint32_t kKeyUnscored = 0xfffffffdu, kKeyProtected = 0xfffffffeu;

struct Choice {
  uint32_t key;
  int mate;  // number of the destination; ~number if the source may not merge
};

__device__ inline Choice make_choice(const MatchParams& p, int64_t b, int position, float score, int column,
                                     int first_allowed) {
  const bool free = position >= p.protect;
  const float ranking = p.bias ? score + p.bias[b * p.bias_batch_stride + position * p.bias_stride] : score;
  const bool scored = free && score > -kInfinity && !isnan(ranking);
  const bool eligible = p.by_threshold ? scored && score > p.threshold : free;
  const int mate = scored ? column : first_allowed;
  return {scored ? descending_key(ranking) : free ? kKeyUnscored : kKeyProtected, eligible ? mate : ~mate};
}

// The first destination that may be merged into, 0 if there is none.
__device__ inline int find_first_allowed(const TokenList& dst, int protect, int* scratch) {
  if (threadIdx.x == 0) *scratch = dst.count;
  __syncthreads();
  for (int j = int(threadIdx.x); j < dst.count; j += int(blockDim.x)) {
    if (dst.at(j) < protect) continue;
    atomicMin(scratch, j);
    break;
  }
  __syncthreads();
  return *scratch < dst.count ? *scratch : 0;
}

// ---- selection ------------------------------------------------------------------------------------------------------

// What becomes of a source: its mate's number if it merges, else ~(its place in order). `all` and `eligible` are how
// many sources come before it: of all, and of those that may merge.
__device__ inline int decide(int mate, int all, int eligible, int r) { return mate >= 0 && eligible < r ? mate : ~all; }

// From the sources' sorted order to what becomes of each, in place of its mate.
__device__ inline void decide_in_order(const uint64_t* order, int n_src, int r, bool ranks_differ, int* mates,
                                       int* scratch) {
  int carry = 0;
  for (int base = 0; base < n_src; base += int(blockDim.x)) {
    const int place = base + int(threadIdx.x);
    const bool inside = place < n_src;
    const int i = inside ? int(uint32_t(order[place])) : 0;
    const int mate = inside ? mates[i] : ~0;
    int eligible = place;  // those that may merge come first
    if (ranks_differ) {
      int total;
      eligible = carry + block_exclusive_sum(mate >= 0, scratch, total);
      carry += total;
    }
    if (inside) mates[i] = decide(mate, place, eligible, r);
  }
}

// A source's place in order, by counting those before it: for more sources than one block could sort.
struct Ranks {
  int all = 0, eligible = 0;

  // Adds what keys[0, count), of sources `begin` onwards, say about source i. Equal keys go by index.
  __device__ void count(const uint32_t* keys, const int* mates, int begin, int count, int i, uint32_t key, bool both) {
    const int split = max(0, min(i - begin, count));
    if (both) {
      for (int j = 0; j < count; ++j) {
        const bool before = j < split ? keys[j] <= key : keys[j] < key;
        all += before;
        eligible += before && mates[j] >= 0;
      }
    } else {
      int before = 0;
      for (int j = 0; j < split; ++j) before += keys[j] <= key;
      for (int j = split; j < count; ++j) before += keys[j] < key;
      all += before;
      eligible += before;
    }
  }
};

// ---- numbering the slots --------------------------------------------------------------------------------------------

// Heads, the tokens that keep a slot, are numbered by a bit set over their places in slot order: a head's slot is the
// number of bits before its own. In order "tome" the places are [tokens in neither list][kept sources][destinations];
// in order "sorted" a head's place is its lowest member.
struct Numbering {
  int* scratch;    // one int per warp
  uint32_t* bits;  // order_words
  int* before;     // bits set in the words before
  int* slot;       // [n], the result; places on the way, ~mate for tokens merged away
};

// Gives every token its place, or ~mate. Returns how many tokens merge.
__device__ inline int place_tokens(const MatchParams& p, const TokenList& src, const TokenList& dst, const int* state,
                                   const Numbering& memory) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  for (int i = thread; i < p.n; i += threads) memory.slot[i] = i;
  __syncthreads();
  for (int j = thread; j < dst.count && !p.sorted_order; j += threads)
    if (dst.at(j) >= p.protect) memory.slot[dst.at(j)] = 2 * p.n + j;
  __syncthreads();

  int merged = 0, total;
  for (int i = thread; i < src.count; i += threads) {
    const int position = src.at(i);
    if (state[i] >= 0) {
      memory.slot[position] = ~state[i];
      ++merged;
    } else if (!p.sorted_order && position >= p.protect) {
      memory.slot[position] = p.n + (p.protect == 0 ? ~state[i] : position);
    }
  }
  block_exclusive_sum(merged, memory.scratch, total);
  for (int i = thread; i < src.count && p.sorted_order; i += threads)
    if (state[i] >= 0) atomicMin(&memory.slot[dst.at(state[i])], src.at(i));
  return total;
}

__device__ inline void number_slots(const MatchParams& p, int64_t b, const int* state, const Numbering& memory) {
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const TokenList src = p.src.sample(b), dst = p.dst.sample(b);
  const int words = p.order_words;
  for (int w = thread; w < words; w += threads) memory.bits[w] = 0;
  const int merged = place_tokens(p, src, dst, state, memory);
  if (thread == 0) p.counts[b] = p.n - merged;
  __syncthreads();

  // Where nothing merges, every token stays where it is.
  for (int i = thread; i < p.n; i += threads) {
    if (merged == 0) memory.slot[i] = i;
    const int place = memory.slot[i];
    if (place >= 0) atomicOr(&memory.bits[place / 32], 1u << (place % 32));
  }
  __syncthreads();
  int carry = 0;
  for (int base = 0; base < words; base += threads) {
    const int w = base + thread;
    int total;
    const int before = block_exclusive_sum(w < words ? __popc(memory.bits[w]) : 0, memory.scratch, total);
    if (w < words) memory.before[w] = carry + before;
    carry += total;
  }
  __syncthreads();

  // Slots of the heads, then of the tokens that go with them. The bounds only matter for positions given twice.
  for (int i = thread; i < p.n; i += threads) {
    const int place = memory.slot[i];
    if (place < 0) continue;
    const unsigned lower = memory.bits[place / 32] & ((1u << (place % 32)) - 1);
    memory.slot[i] = min(memory.before[place / 32] + __popc(lower), p.n_out - 1);
  }
  __syncthreads();
  for (int i = thread; i < src.count; i += threads)
    if (state[i] >= 0) memory.slot[src.at(i)] = max(memory.slot[dst.at(state[i])], 0);
  __syncthreads();
}

// ---- kernels --------------------------------------------------------------------------------------------------------

// The rest of a sample, from its sources' choices, in one block.
__device__ inline void finish_sample(const MatchParams& p, int64_t b, SharedMemory& memory, int* scratch,
                                     uint64_t* order, int* mates) {
  const int n_src = p.src.count, thread = int(threadIdx.x), threads = int(blockDim.x);
  for (int i = n_src + thread; i < p.sort_width; i += threads) order[i] = ~uint64_t(0);
  __syncthreads();
  sort_in_block(order, p.sort_width);
  decide_in_order(order, n_src, p.r, p.ranks_differ(), mates, scratch);
  __syncthreads();

  const Numbering numbering{scratch, memory.take<uint32_t>(p.order_words, "bits"),
                            memory.take<int>(p.order_words, "before"), memory.take<int>(p.n, "slot")};
  number_slots(p, b, mates, numbering);
  const int* const slot = numbering.slot;
  for (int i = thread; i < p.n; i += threads) p.assign[b * p.n + i] = slot[i];
  build_csr(slot, p.n, p.n_out, p.csr, memory, scratch, p.offsets + b * (p.n_out + 1), p.members + b * p.n);
}

// Grid: row_tiles blocks per sample. Blocks of kWarps warps, 16 sources each.
template <class T, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, kWarps == 8 ? 2 : 3) match_kernel(const MatchParams p) {
  FASTOK_SHARED(shared);
  const int64_t b = blockIdx.x / unsigned(p.row_tiles);
  const int row_begin = int(blockIdx.x % unsigned(p.row_tiles)) * kWarps * 16;
  const T* const metric = static_cast<const T*>(p.metric) + b * p.batch_stride;
  const RowList<T> sources{p.src.sample(b), metric, p.row_stride};
  const RowList<T> destinations{p.dst.sample(b), metric, p.row_stride};

  Best best;
  find_best<T, kWarps>(sources, row_begin, destinations, {p.protect, nullptr, 0}, p.shape, shared, best);

  // Choices go to shared memory if this block has the whole sample, else to what will hold the results.
  SharedMemory memory(shared);
  const int n_src = sources.tokens.count;
  const bool alone = p.fused && p.row_tiles == 1;
  int* const scratch = memory.take<int>(32, "scratch");
  uint64_t* const order = memory.take<uint64_t>(p.fused ? p.sort_width : 0, "order");
  int* const mates = memory.take<int>(p.fused ? n_src : 0, "mates");
  uint32_t* const global_keys = reinterpret_cast<uint32_t*>(p.members + b * p.n);
  int* const global_mates = p.assign + b * p.n;
  const int first_allowed = find_first_allowed(destinations.tokens, p.protect, scratch);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row_begin + warp_index() * 16 + lane_index() / 4 + 8 * half;
    if (i >= n_src || lane_index() % 4 != 0) continue;
    const Choice choice = make_choice(p, b, sources.tokens.at(i), best.score[half], best.column[half], first_allowed);
    if (alone) {
      order[i] = ordered(choice.key, i);
      mates[i] = choice.mate;
    } else {
      global_keys[i] = choice.key;
      global_mates[i] = choice.mate;
    }
  }
  if (!p.fused) return;

  // The last block of a sample goes on. `counts`, zeroed before the launch, counts the others.
  if (!alone) {
    // One thread's fences release what the block wrote before the barrier, and acquire for it what others did.
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      __threadfence();
      last = atomicAdd(&p.counts[b], 1) == p.row_tiles - 1;
      __threadfence();
    }
    if (!__syncthreads_or(last)) return;
    for (int i = int(threadIdx.x); i < n_src; i += int(blockDim.x)) {
      order[i] = ordered(__ldcg(global_keys + i), i);
      mates[i] = __ldcg(global_mates + i);
    }
  }
  finish_sample(p, b, memory, scratch, order, mates);
}

// Where rank_kernel leaves the states: in place of the mates, unless other blocks still read those. Then there is a
// threshold, hence room for N states in `offsets`.
__device__ inline int32_t* states_of(const MatchParams& p, int64_t b) {
  return p.ranks_differ() ? p.offsets + b * (p.n_out + 1) : p.assign + b * p.n;
}

// Grid: rank_blocks blocks per sample, one source per thread, all keys through shared memory.
__global__ void __launch_bounds__(kRankThreads) rank_kernel(const MatchParams p, int rank_blocks) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  uint32_t* const keys = memory.take<uint32_t>(kRankTile, "keys");
  int* const mates = memory.take<int>(kRankTile, "mates");
  const int64_t b = blockIdx.x / unsigned(rank_blocks);
  const int i = int(blockIdx.x % unsigned(rank_blocks)) * kRankThreads + int(threadIdx.x), n_src = p.src.count;
  const uint32_t* const all_keys = reinterpret_cast<const uint32_t*>(p.members + b * p.n);
  const int* const all_mates = p.assign + b * p.n;

  Ranks ranks;
  const uint32_t key = i < n_src ? all_keys[i] : 0;
  for (int begin = 0; begin < n_src; begin += kRankTile) {
    const int count = min(kRankTile, n_src - begin);
    __syncthreads();
    for (int j = int(threadIdx.x); j < count; j += kRankThreads) {
      keys[j] = all_keys[begin + j];
      if (p.ranks_differ()) mates[j] = all_mates[begin + j];
    }
    __syncthreads();
    ranks.count(keys, mates, begin, count, i, key, p.ranks_differ());
  }
  if (i < n_src) states_of(p, b)[i] = decide(all_mates[i], ranks.all, ranks.eligible, p.r);
}

// Grid: one block per sample. Slots are made in `members`, then moved.
__global__ void __launch_bounds__(kSlotThreads, 1) slot_kernel(const MatchParams p) {
  FASTOK_SHARED(shared);
  const int64_t b = blockIdx.x;
  int32_t *const assign = p.assign + b * p.n, *const members = p.members + b * p.n;
  SharedMemory memory(shared);
  int* const scratch = memory.take<int>(32, "scratch");
  number_slots(
      p, b, states_of(p, b),
      {scratch, memory.take<uint32_t>(p.order_words, "bits"), memory.take<int>(p.order_words, "before"), members});
  for (int i = int(threadIdx.x); i < p.n; i += int(blockDim.x)) assign[i] = members[i];
  __syncthreads();
  build_csr(assign, p.n, p.n_out, p.csr, memory, scratch, p.offsets + b * (p.n_out + 1), members);
}

// Grid: covers B * (N + 1) elements. The map that leaves all tokens where they are.
__global__ void identity_kernel(int64_t batch, int n, int32_t* assign, int32_t* counts, int32_t* offsets,
                                int32_t* members) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t b = i / (n + 1);
  const int place = int(i % (n + 1));
  if (b >= batch) return;
  offsets[i] = place;
  if (place == n) {
    counts[b] = n;
  } else {
    assign[b * n + place] = members[b * n + place] = place;
  }
}

}  // namespace fastok::cuda
