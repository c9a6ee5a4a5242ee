// The SIMT machine: one fiber per CUDA thread, blocks one after another, and whichever fiber can run next is drawn from
// a seeded generator. A fiber gives way at barriers, warp collectives and atomics only; that accesses are ordered is
// not left to luck but told by clocks (order.h).
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
  int number = 0, warp = 0, lane = 0;
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
  // Of each launch of the call: threads of a block.
  const std::vector<int>& launches() const { return launches_; }
  const dim3& block_index() const { return block_index_; }
  int threads() const { return int(launch_->block.x * launch_->block.y * launch_->block.z); }
  Fiber& fiber(int warp, int lane) { return fibers_[size_t(warp * kWarpSize + lane)]; }
  Warp& warp_of(const Fiber& fiber) { return warps_[size_t(fiber.warp)]; }

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

  // ---- what is ordered

  Clock launch_begin() const { return launch_begin_; }
  Clock block_begin() const { return block_begins_.back(); }
  Clock base() const { return base_; }
  // Whether what `lane` of the stamp did to the word comes before what the current fiber does now.
  bool ordered(const Stamp& stamp, int lane, const void* word) const;
  void release_and_acquire(const void* address, size_t bytes);

  // ---- reports

  [[noreturn]] void fail(const std::string& what);
  std::string describe(const Fiber& fiber) const;
  std::string describe_thread(int number, dim3 block) const;
  dim3 block_at(Clock clock) const;  // that ran then
  std::string describe_epoch() const;

 private:
  void run_block(dim3 index);
  void start(int i);
  static void enter();
  void leave();
  void resume();
  void give_way();
  void complete(const Meeting& meeting);
  void complete(Barrier& barrier);
  void complete_if_due(Mbarrier& barrier);
  Knowledge own_knowledge(const Fiber& fiber) const;
  void share_knowledge(std::span<const int> fibers);
  size_t block_of(Clock clock) const;  // counting in the order in which they ran
  std::string deadlock() const;
  std::string complaint(const std::string& what) const;

  Memory memory_;
  std::mt19937_64 random_;
  uint64_t call_seed_ = 0;
  std::vector<int> launches_;
  const Launch* launch_ = nullptr;
  dim3 block_index_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<Barrier> barriers_;
  std::map<const void*, Mbarrier> mbarriers_;
  Fiber copier_;
  Fiber* copies_for_ = nullptr;
  std::vector<int> runnable_;
  int exited_ = 0, epoch_ = 0;
  Site last_barrier_;
  std::string failure_;
  jmp_buf scheduler_;

  Clock latest_ = 0, launch_begin_ = 0, base_ = 0;
  std::vector<Clock> block_begins_;
  std::vector<size_t> block_order_;
};

// The fiber that runs now; null between launches. Everything that the hooks see is its doing.
extern Fiber* current;

std::string describe(const Site& site);
std::string describe(dim3 index);

}  // namespace simt
