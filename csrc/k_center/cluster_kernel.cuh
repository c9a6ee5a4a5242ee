// All picks of a sample in one launch, by a cluster of blocks (sm_90 and newer). Every block has a share of the tokens,
// of which it keeps in shared memory what fits; at every pick it finds the best of them, and tells the others.
// Torch-free.
#pragma once
#include "k_center/k_center_kernel.cuh"
#include "ptx/cluster.h"

namespace fastok::cuda {

// ---- best tokens ----------------------------------------------------------------------------------------------------

// A token and its value, such that the larger key is the better one and of equal values the lower token is. Values are
// not negative, so that their bits are in the same order: 64 bits together for max_min, whose values are fp32. Most
// significant word first; zeros: none.
template <bool kSum>
struct TokenKey {
  static constexpr int kWords = key_words(kSum);
  unsigned word[kWords] = {};

  TokenKey() = default;
  __device__ explicit TokenKey(const BestToken& best) {
    if (best.token < 0) return;
    if constexpr (kSum) {
      const auto bits = uint64_t(__double_as_longlong(best.value));
      word[0] = unsigned(bits >> 32), word[1] = unsigned(bits);
    } else {
      word[0] = __float_as_uint(float(best.value));
    }
    word[kWords - 1] = ~unsigned(best.token);
  }
  __device__ BestToken best() const {
    BestToken best;
    if (word[kWords - 1] == 0) return best;
    best.token = int(~word[kWords - 1]);
    if constexpr (kSum) {
      best.value = __longlong_as_double((long long)(uint64_t(word[0]) << 32 | word[1]));
    } else {
      best.value = double(__uint_as_float(word[0]));
    }
    return best;
  }
  __device__ bool operator<(const TokenKey& other) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (word[i] != other.word[i]) return word[i] < other.word[i];
    return false;
  }
};

// The largest of a warp, in all its lanes.
template <bool kSum>
__device__ __forceinline__ TokenKey<kSum> warp_largest(TokenKey<kSum> key) {
  bool largest = true;
#pragma unroll
  for (unsigned& word : key.word) {
    const unsigned most = __reduce_max_sync(kFullWarp, largest ? word : 0u);
    largest = largest && word == most;
    word = most;
  }
  return key;
}

// ---- distances ------------------------------------------------------------------------------------------------------

// A channel of a token as it is compared: the integer that the cosine is made of, or the fp32 number.
template <bool kCosine>
using Word = std::conditional_t<kCosine, int, float>;

template <bool kCosine, class T>
__device__ __forceinline__ Word<kCosine> word_of(T x, float scale) {
  if constexpr (kCosine) {
    return scale == 0 ? 0 : __float2int_rn(widen(x) * scale);
  } else {
    return widen(x);
  }
}

// Exact in 64 bits: a sum is at most the product of two norms, 2^48.
__device__ __forceinline__ void accumulate(int64_t& sum, int a, int b) { sum += int64_t(a) * b; }
__device__ __forceinline__ void accumulate(double& sum, float a, float b) {
  const double difference = double(a) - double(b);
  sum = ptx::add_rn(sum, ptx::mul_rn(difference, difference));  // two roundings: never fused
}

// Of kRows sums over a warp each, in the order of warp_sum, that of row lane_index() / (kWarpSize / kRows).
template <int kRows>
__device__ __forceinline__ double warp_sums(double (&sum)[kRows]) {
  int half = kWarpSize / 2;
#pragma unroll
  for (int rows = kRows; rows > 1; rows /= 2, half /= 2) {
    const bool upper = lane_index() & half;
#pragma unroll
    for (int i = 0; i < rows / 2; ++i) {
      const double given = __shfl_xor_sync(kFullWarp, upper ? sum[i] : sum[i + rows / 2], half);
      sum[i] = (upper ? sum[i + rows / 2] : sum[i]) + given;
    }
  }
#pragma unroll
  for (; half > 0; half /= 2) sum[0] += __shfl_xor_sync(kFullWarp, sum[0], half);
  return sum[0];
}

// ---- a block's share ------------------------------------------------------------------------------------------------

// What a block knows of its tokens, and the pick that they are compared with.
template <class T, bool kCosine>
struct TokenShare {
  const CenterParams& p;
  int64_t b;
  int begin, count;  // of the tokens
  double* value;     // of each; kNowhere: it is not available
  const double* norm;
  const Word<kCosine>* rows;    // of those that are kept
  const Word<kCosine>* center;  // the pick
  double center_norm;

  // The values of kRows tokens, `warps` apart, after a pick; by a warp. kKept: they are all among the rows. kAtOnce:
  // channels that are read together.
  template <bool kKept, int kRows, int kAtOnce>
  __device__ __forceinline__ void compare(int step, BestToken pick, int first, int warps, BestToken& best) const {
    constexpr int kLanes = kWarpSize / kRows;  // that get to know a token's sum
    const int mine = first + lane_index() / kLanes * warps;
    double now = value[mine];
    if (!__any_sync(kFullWarp, now != kNowhere)) return;

    using Element = std::conditional_t<kKept, Word<kCosine>, T>;
    const Element* row[kRows];
    [[maybe_unused]] float scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = first + r * warps;
      if constexpr (kKept) {
        row[r] = rows + i * p.width;
      } else {
        row[r] = token_row<T>(p, b, begin + i), scale[r] = p.scale[b * p.n + begin + i];
      }
    }
    std::conditional_t<kCosine, int64_t, double> sum[kRows] = {};
#pragma unroll(kAtOnce == 1 ? 4 : 2)
    for (int d = lane_index() * kAtOnce; d < p.width; d += kWarpSize * kAtOnce) {
      const auto ours = *reinterpret_cast<const Pack<Word<kCosine>, kAtOnce>*>(center + d);
      Pack<Element, kAtOnce> theirs[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) theirs[r] = *reinterpret_cast<const Pack<Element, kAtOnce>*>(row[r] + d);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
          if constexpr (kKept) {
            accumulate(sum[r], ours.at[e], theirs[r].at[e]);
          } else {
            accumulate(sum[r], ours.at[e], word_of<kCosine>(theirs[r].at[e], scale[r]));
          }
        }
      }
    }
    double part[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) part[r] = double(sum[r]);
    const double total = warp_sums(part);
    __syncwarp();  // all have read the value
    if (lane_index() % kLanes != 0 || now == kNowhere) return;
    if (begin + mine == pick.token) {
      now = kNowhere;
    } else {
      now = updated(p, step, now, kCosine ? cosine_distance(total, center_norm, norm[mine]) : float(sqrt(total)));
    }
    value[mine] = now;
    best.offer(now, begin + mine);
  }

  // Of tokens [first, end) every warp's own.
  template <bool kKept, int kAtOnce>
  __device__ __forceinline__ void compare_all(int step, BestToken pick, int first, int end, BestToken& best) const {
    const int warps = warps_in_block();
    int i = first + warp_index();
    for (; i + 3 * warps < end; i += 4 * warps) compare<kKept, 4, kAtOnce>(step, pick, i, warps, best);
#pragma unroll 1
    for (; i < end; i += warps) compare<kKept, 1, kAtOnce>(step, pick, i, warps, best);
  }
  // The best token after a pick, as far as lanes of warps know it. `kept` of the share are among the rows.
  template <int kAtOnce>
  __device__ __forceinline__ BestToken best_after(int step, BestToken pick, int kept) const {
    BestToken best;
    compare_all<true, kAtOnce>(step, pick, 0, kept, best);
    compare_all<false, kAtOnce>(step, pick, kept, count, best);
    return best;
  }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

// Grid: plan.blocks per sample, a cluster.
template <class T, bool kCosine, bool kSum>
__global__ void __launch_bounds__(kMostClusterWarps* kWarpSize, 1)
    cluster_kernel(const CenterParams p, const ClusterPlan plan) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // before there are no clusters, and this is not launched
  using Key = TokenKey<kSum>;
  const int64_t b = blockIdx.x / unsigned(plan.blocks);
  const int rank = ptx::cluster_ctarank(), thread = int(threadIdx.x), threads = int(blockDim.x);
  const int begin = rank * plan.share, count = min(plan.share, max(p.n - begin, 0));
  const int kept = min(plan.resident, count), keys_each = plan.blocks * plan.warps;
  const int64_t at = b * p.n + begin;
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  double* const values = memory.take<double>(32, "values");
  int* const tokens = memory.take<int>(32, "tokens");
  Key* const keys = memory.take<Key>(2 * keys_each, "keys");
  auto* const center = memory.take<Word<kCosine>>(p.width, "center");
  double* const value = plan.shared_state ? memory.take<double>(plan.share, "value") : p.value + at;
  double* const norm = plan.shared_state ? memory.take<double>(plan.share, "norm") : p.norm + at;
  auto* const rows = memory.take<Word<kCosine>>(plan.resident * p.width, "rows");

  for (int i = thread; i < count; i += threads) {
    value[i] = p.rank[at + i];
    if (plan.shared_state) norm[i] = p.norm[at + i];
  }
  for (int i = warp_index(); i < kept; i += plan.warps) {
    const T* const row = token_row<T>(p, b, begin + i);
    const float scale = p.scale[at + i];
    for (int d = lane_index(); d < p.width; d += kWarpSize) rows[i * p.width + d] = word_of<kCosine>(row[d], scale);
  }
  ptx::barrier_cluster_arrive();
  BestToken best = best_first(p, b, values, tokens);
  ptx::barrier_cluster_wait();

  for (int step = 0; step < p.k; ++step) {
    if (rank == 0) write_pick(p, b, step, best, values, tokens);
    if (best.token < 0 || step + 1 == p.k) continue;  // in all blocks
    // The pick, from whoever keeps it.
    const int owner = best.token / plan.share, place = best.token % plan.share;
    if (place < plan.resident) {
      const uint32_t row = ptx::mapa(rows + place * p.width, owner);
      auto* const words = reinterpret_cast<uint32_t*>(center);
      for (int d = thread; d < p.width; d += threads) words[d] = ptx::ld_shared_cluster(row + uint32_t(d) * kWordBytes);
    } else {
      const T* const row = token_row<T>(p, b, best.token);
      const float scale = p.scale[b * p.n + best.token];
      for (int d = thread; d < p.width; d += threads) center[d] = word_of<kCosine>(row[d], scale);
    }
    __syncthreads();

    const TokenShare<T, kCosine> share{p, b, begin, count, value, norm, rows, center, p.norm[b * p.n + best.token]};
    BestToken next;
    if (kCosine && plan.by_fours) {  // the other's order of summation is prescribed
      next = share.template best_after<kCosine ? 4 : 1>(step, best, kept);
    } else {
      next = share.template best_after<1>(step, best, kept);
    }

    // By turns, as others may still read the keys of the last pick.
    Key* const now = keys + step % 2 * keys_each;
    const Key own = warp_largest(Key(next));
    if (lane_index() < plan.blocks) {
      const uint32_t theirs = ptx::mapa(now + rank * plan.warps + warp_index(), lane_index());
#pragma unroll
      for (int i = 0; i < Key::kWords; ++i) ptx::st_shared_cluster(theirs + uint32_t(i) * kWordBytes, own.word[i]);
    }
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
    Key largest;
    for (int i = lane_index(); i < keys_each; i += kWarpSize)
      if (largest < now[i]) largest = now[i];
    best = warp_largest(largest).best();
  }
#endif
}

}  // namespace fastok::cuda
