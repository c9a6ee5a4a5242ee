// How k_center runs on CUDA. Pure functions. Torch-free.
#pragma once
#include <algorithm>

#include "common/plan.h"

namespace fastok::cuda {

constexpr int kCenterThreads = 256;    // of blocks whose warps take a token each
constexpr int kPickThreads = 512;      // of the block that picks for a sample
constexpr int kMostTokenBlocks = 512;  // per sample: what each block of the next step looks through

// ---- a cluster of blocks per sample ---------------------------------------------------------------------------------

constexpr int kMostClusterWarps = 16;  // of a block
constexpr int kMostClusterBlocks = 8;  // on every device that has clusters
constexpr int kFewTokens = 16;         // that one block picks from as fast as several
constexpr int kFirstClusterArch = 90;  // compute capability 9.0
constexpr int kWordBytes = 4;          // that a channel of a token takes in shared memory

struct ClusterPlan {
  int blocks, warps;  // per sample, of each block; 0 blocks: no clusters
  int share;          // tokens of a block
  int resident;  // of these kept in shared memory, a multiple of `warps` if not all; the rest is read at every pick
  bool shared_state;  // what is known of the share's tokens is kept there too
  bool by_fours;      // rows begin at multiples of four channels, and are as long
  size_t bytes;       // of shared memory
};

// Words in which blocks tell each other what their best token is.
FASTOK_HOST_DEVICE constexpr int key_words(bool max_sum) { return max_sum ? 3 : 2; }

// What a block always has: scratch of two reductions, all warps' keys by turns, the pick.
inline constexpr size_t cluster_bytes(int blocks, int warps, int64_t width, bool max_sum) {
  return shared_bytes<double>(32) + shared_bytes<int>(32) +
         shared_bytes<unsigned>(size_t(2 * blocks * warps * key_words(max_sum))) + shared_bytes<int>(size_t(width));
}

// most_bytes: of shared memory, that the device grants a block.
inline ClusterPlan plan_cluster(int64_t n, int64_t width, bool max_sum, size_t most_bytes) {
  ClusterPlan plan{};
  int blocks = 1;
  while (blocks < kMostClusterBlocks && n > int64_t(blocks) * kFewTokens) blocks *= 2;
  const int64_t share = (n + blocks - 1) / blocks;
  const int warps = int(std::clamp<int64_t>(share, 1, kMostClusterWarps));
  size_t bytes = cluster_bytes(blocks, warps, width, max_sum);
  if (bytes > most_bytes) return plan;
  const size_t state = 2 * shared_bytes<double>(size_t(share));
  plan.shared_state = bytes + state <= most_bytes;
  if (plan.shared_state) bytes += state;
  const int64_t row = std::max<int64_t>(width, 1) * kWordBytes, fitting = int64_t(most_bytes - bytes) / 16 * 16 / row;
  plan.resident = int(fitting >= share ? share : fitting / warps * warps);
  plan.blocks = blocks, plan.warps = warps, plan.share = int(share);
  plan.bytes = bytes + shared_bytes<int>(size_t(plan.resident) * size_t(width));
  return plan;
}

// ---- who picks ------------------------------------------------------------------------------------------------------

struct CenterProblem {
  int64_t batch, n, width, k;
  bool cosine, max_sum, isolated;
};

struct CenterDevice {
  int arch;           // that it runs code of: 90 is compute capability 9.0's
  size_t most_bytes;  // of shared memory, that it grants a block
};

struct CenterPlan {
  bool gram;            // all distances first, then every pick of a sample in one block
  ClusterPlan cluster;  // else every pick of a sample in one cluster, if it has blocks; else a launch per pick
  int token_blocks;     // per sample, of a launch per pick
  size_t gram_numbers;  // 0 without
  size_t pick_bytes;    // of shared memory

  bool launch_per_pick() const { return !gram && cluster.blocks == 0; }
  // Doubles per token that are kept between picks in global memory.
  bool global_values() const { return !gram && !cluster.shared_state; }
};

// All distances pay for the cosine where they fit, and the values of a sample into a block's shared memory. With
// clusters only if the isolated start needs them anyway.
inline CenterPlan plan_k_center(const CenterProblem& p, const CenterDevice& device) {
  constexpr int64_t kMostGramNumbers = int64_t(1) << 27, kMostTokens = 8192, kFewPicks = 8;
  CenterPlan plan{};
  const ClusterPlan cluster =
      device.arch >= kFirstClusterArch ? plan_cluster(p.n, p.width, p.max_sum, device.most_bytes) : ClusterPlan{};
  plan.gram = p.cosine && p.n <= kMostTokens && p.batch * p.n * p.n <= kMostGramNumbers && p.k >= kFewPicks &&
              (p.isolated || cluster.blocks == 0);
  if (plan.gram) {
    plan.gram_numbers = size_t(p.batch * p.n * p.n);
    plan.pick_bytes = shared_bytes<double>(32) + shared_bytes<int>(32) + shared_bytes<double>(size_t(p.n));
  } else {
    plan.cluster = cluster;
  }
  plan.token_blocks =
      int(std::clamp<int64_t>((p.n + kCenterThreads / 32 - 1) / (kCenterThreads / 32), 1, kMostTokenBlocks));
  return plan;
}

}  // namespace fastok::cuda
