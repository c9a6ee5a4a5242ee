// What happens before what: the clocks by which two accesses are told to be ordered or to race.
//
// One counter runs through a whole call. Every synchronisation gives its participants the next value, so that equal
// clocks in a warp mean "synchronised together, and not since". A block barrier orders all threads of a block: what
// carries a smaller clock than the last one (the block's `base`) needs no further thought. Within a warp each lane
// keeps what it has seen of the 31 others. All other order is rare (between warps without a block barrier, and between
// blocks, of a cluster or not) and is kept as Knowledge, shared by the threads that have the same.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>

namespace simt {

using Clock = uint32_t;
constexpr int kWarpSize = 32;

// For each lane of a warp, the last of its clocks whose accesses are seen.
using Row = std::array<Clock, kWarpSize>;

class Knowledge;
using Known = std::shared_ptr<const Knowledge>;  // null: nothing

class Knowledge {
 public:
  Knowledge() = default;
  // All that one thread of block `block` has seen of its own block.
  Knowledge(uint32_t block, Clock base, int warp, const Row& row) { add(block, base, warp, row); }

  bool covers(uint32_t block, int warp, int lane, Clock clock) const {
    const auto part = blocks_.find(block);
    if (part == blocks_.end()) return false;
    if (clock < part->second.base) return true;
    const auto row = part->second.warps.find(warp);
    return row != part->second.warps.end() && row->second[size_t(lane)] >= clock;
  }

  // The atomics on `word` up to `clock` have been observed: they come before, released or not.
  void observe(const void* word, Clock clock) { words_[word] = clock; }
  bool observed(const void* word, Clock clock) const {
    const auto found = words_.find(word);
    return found != words_.end() && found->second >= clock;
  }

  void add(const Knowledge& other) {
    for (const auto& [word, clock] : other.words_) words_[word] = std::max(words_[word], clock);
    for (const auto& [block, theirs] : other.blocks_)
      for (const auto& [warp, row] : theirs.warps) add(block, theirs.base, warp, row);
  }
  void add(uint32_t block, Clock base, int warp, const Row& row) {
    Part& part = blocks_[block];
    part.base = std::max(part.base, base);
    Row& ours = part.warps[warp];
    for (size_t lane = 0; lane < row.size(); ++lane) ours[lane] = std::max(ours[lane], row[lane]);
  }

 private:
  struct Part {
    Clock base = 0;
    std::map<int, Row> warps;
  };
  std::map<uint32_t, Part> blocks_;
  std::map<const void*, Clock> words_;
};

inline Known joined(const Known& a, const Known& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto both = std::make_shared<Knowledge>(*a);
  both->add(*b);
  return both;
}

}  // namespace simt
