// The SIMT machine: one fiber per CUDA thread, blocks one after another but for those of a cluster, which run together,
// and whichever fiber can run next is drawn from a seeded generator. A fiber gives way at barriers, warp collectives
// and atomics only; that accesses are ordered is not left to luck but told by clocks (order.h).
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory.h"
#include "order.h"
#include "simt.h"

namespace simt {

constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kNamedBarriers = 16;
constexpr int kMostClusterBlocks = 8;  // on every device that has clusters
// Warps are numbered through the cluster, each block's from a multiple of this on: those of its threads first, then one
// for each mbarrier's copies.
constexpr int kWarpNumbers = 4096;
static_assert(kMostClusterBlocks * kWarpNumbers <= 1 << 16);

// What a detector found. Places in the code stand as <+0x1234>, for Python to look up.
struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A wgmma that nobody has waited for yet: what multiply_async of hopper.h was given.
struct AsyncProduct {
  bool f16, add;
  float* d;
  int columns;
  const uint32_t* a;
  uint64_t a_rows, b;
  int group;  // -1: not committed yet
  Pc pc;
};

// Ends in a page that may not be touched: a thread that needs more does not go on in another's memory.
class Stack {
 public:
  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  std::byte* begin() const { return begin_; }

 private:
  std::byte* begin_;
};

// Contexts start by ucontext and then switch by _setjmp, which unlike swapcontext makes no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<Stack> stack;
  int number = 0;  // in the cluster
  int rank = 0;    // of its block there
  int warp = 0, lane = 0;
  dim3 index;
  bool started = false, done = false;

  // Where it waits, for reports.
  const char* waits_in = nullptr;
  Site waits_at;
  int answer = 0;         // of the barrier
  void* given = nullptr;  // to the meeting

  Clock clock = 0;
  Row seen{};
  Known known;     // beyond its own warp and the last block barrier
  Known fenced;    // what its next atomic releases
  Known acquired;  // what its next fence makes known

  bool at_cluster_barrier = false;  // it has arrived, and not waited yet
  int cluster_phases = 0;           // of the cluster's barrier that it has waited for
  Known known_at_arrival;

  SharedLayout shared;
  std::vector<AsyncCopy> copies;
  int copy_groups = 0;
  std::vector<AsyncProduct> products;
  int product_groups = 0;
};

// The lanes of one warp in one collective.
struct Meeting {
  const char* name;
  Site site;
  void (*act)(const Meeting&);
  int warp;
  unsigned mask, arrived;
};

struct Warp {
  unsigned exited = 0;
  int64_t products = 0;  // that its lanes have started
  Clock last_sync = 0;   // of all lanes
  std::vector<Meeting> meetings;
};

struct Barrier {
  const char* name = nullptr;
  Site site;
  int expected = 0, arrived = 0, positive = 0;
  Knowledge seen;  // by all who came, where not all of the block do
  std::vector<int> members, waiting;
};

// One in shared memory (hopper.h). Counts what the phase still lacks.
struct Mbarrier {
  int expected = 0, pending = 0;
  int64_t bytes = 0;
  int phases = 0;   // that have ended
  Knowledge seen;   // by all who came in this one
  Known completed;  // and in those before
  int warp = 0;     // as which its copies count: only who waits for the barrier comes after them
  std::vector<int> waiting;
};

struct Block {
  dim3 index;
  std::vector<Warp> warps;
  std::vector<Barrier> barriers;
  int exited = 0, epoch = 0;
  Site last_barrier;
  Clock base = 0;  // of what comes after the last barrier of all its threads
};

// barrier.cluster: all threads of all blocks arrive in every phase.
struct ClusterBarrier {
  int arrived = 0, phases = 0;
  Knowledge seen;             // by all who came in this phase, at their arrivals
  std::vector<Known> joined;  // of what they knew besides, what `seen` has
  Known completed;
  std::vector<int> waiting;
};

// The fiber that runs now; null between launches. Everything that the hooks see is its doing.
extern Fiber* current;

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // The ops of a call, one or several launches, share seed and arrays.
  void begin_call(uint64_t seed);
  void launch(const Launch& launch);
  void end_call() { memory_.end_call(); }

  Memory& memory() { return memory_; }
  const Launch& launched() const { return *launch_; }
  // Of each launch of the call: threads of a block, blocks of a cluster.
  const std::vector<std::pair<int, int>>& launches() const { return launches_; }
  int threads() const { return int(launch_->block.x * launch_->block.y * launch_->block.z); }
  int cluster_blocks() const { return int(launch_->cluster); }
  Block& block_of(const Fiber& fiber) { return blocks_[size_t(fiber.rank)]; }
  const Block& block_of(const Fiber& fiber) const { return blocks_[size_t(fiber.rank)]; }
  // The threads of the cluster, and of its block `rank`.
  std::span<Fiber> all_fibers() { return {fibers_.data(), size_t(cluster_blocks() * threads())}; }
  std::span<Fiber> fibers_of(int rank) { return all_fibers().subspan(size_t(rank * threads()), size_t(threads())); }
  bool has_exited(int rank) const { return blocks_[size_t(rank)].exited == threads(); }
  Fiber& fiber(int warp, int lane) {
    return fibers_[size_t(warp / kWarpNumbers * threads() + warp % kWarpNumbers * kWarpSize + lane)];
  }
  Warp& warp(int number) { return blocks_[size_t(number / kWarpNumbers)].warps[size_t(number % kWarpNumbers)]; }

  // ---- synchronisation: called by the current fiber

  // Until `count` threads are here. Returns how many came with a predicate that holds.
  int synchronise(const char* name, int id, int count, bool predicate, Site site, bool wait = true);
  // Until all lanes of `mask` that have not exited are here; then act(meeting), once, with what each lane has `given`.
  void meet(const char* name, unsigned mask, void* given, void (*act)(const Meeting&), Site site);
  // The current fiber's part in a phase is done: what it did so far comes before what follows a wait for the phase.
  void arrive(Mbarrier& barrier);
  // Until a phase of this parity has ended.
  void wait(Mbarrier& barrier, int parity);
  Mbarrier& mbarrier(const void* place);
  // What happens in between is a copy's doing, begun by the current fiber.
  void begin_copy(const Mbarrier& barrier);
  void end_copy(Mbarrier& barrier, int64_t bytes);
  void order_warp(int warp, unsigned mask);
  void fence();
  void yield();

  // The barrier of the cluster. What the current fiber has done comes before what any other does that has waited.
  void arrive_at_cluster(Pc pc);
  void wait_for_cluster(Pc pc);
  int cluster_phases() const { return cluster_barrier_.phases; }

  // ---- what is ordered

  Clock launch_begin() const { return launch_begin_; }
  Clock cluster_begin() const { return cluster_begins_.back(); }
  Clock base() const { return block_of(*current).base; }
  // Whether what `lane` of the stamp did to the word comes before what the current fiber does now.
  bool ordered(const Stamp& stamp, int lane, const void* word);
  void release_and_acquire(const void* address, size_t bytes);

  // ---- reports

  [[noreturn]] void fail(const std::string& what);
  std::string describe(const Fiber& fiber) const;
  std::string describe_author(const Stamp& stamp, int lane) const;
  std::string describe_epoch() const;

 private:
  void run_cluster(size_t number);
  void start(int i);
  static void enter();
  void leave();
  void leave_cluster();
  void resume();
  void give_way();
  void complete(const Meeting& meeting);
  void complete(Barrier& barrier);
  void complete_if_due(Mbarrier& barrier);
  Knowledge own_knowledge(const Fiber& fiber) const;
  void share_knowledge(std::span<const int> fibers);
  dim3 block_index(size_t cluster, int rank) const;
  size_t cluster_at(Clock clock) const;  // that ran then, counting in the order in which they ran
  // As Knowledge knows blocks.
  uint32_t block_key(size_t cluster, int rank) const { return uint32_t(cluster) * kMostClusterBlocks + uint32_t(rank); }
  uint32_t own_key(const Fiber& fiber) const { return block_key(cluster_begins_.size() - 1, fiber.rank); }
  std::string describe_thread(int number, dim3 block) const;
  std::string deadlock() const;
  std::string complaint(const std::string& what) const;

  Memory memory_;
  std::mt19937_64 random_;
  uint64_t call_seed_ = 0;
  std::vector<std::pair<int, int>> launches_;
  const Launch* launch_ = nullptr;
  std::vector<Fiber> fibers_;
  std::vector<Block> blocks_;
  ClusterBarrier cluster_barrier_;
  std::map<const void*, Mbarrier> mbarriers_;
  Fiber copier_;
  Fiber* copies_for_ = nullptr;
  std::vector<int> runnable_;
  int exited_ = 0;  // of the cluster
  std::string failure_;
  jmp_buf scheduler_;

  Clock latest_ = 0, launch_begin_ = 0;
  std::vector<Clock> cluster_begins_;
  std::vector<size_t> cluster_order_;
};

std::string describe(const Site& site);
std::string describe(dim3 index);

}  // namespace simt
