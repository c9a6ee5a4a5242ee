// A small SIMT machine on the CPU, enough to run fastok's device code compiled by g++: one fiber per CUDA thread,
// blocks one after another, and whichever fiber can run next is drawn from a seeded generator. csrc/common/device.cuh
// includes this in place of the CUDA headers when FASTOK_HOST is defined.
//
// A fiber gives way at barriers, warp collectives and atomics only. Threads that wait for one another in vain (a
// barrier that part of the block never reaches, lanes in different collectives) are reported as an error.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define FASTOK_SHARED(name) unsigned char* const name = simt::shared_memory()

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

constexpr int kWarpSize = 32;
constexpr size_t kExchangeBytes = 64;
constexpr size_t kStackBytes = 128 << 10;

// Threads that wait for each other: a block, or a warp with the values its lanes exchange.
struct Group {
  int size = 0, arrived = 0;
  const char* doing = nullptr;
  std::vector<int> waiting;
  // Two sets of slots used in turn: a lane cannot be two exchanges ahead of another.
  alignas(16) std::byte slots[2][kWarpSize][kExchangeBytes];
};

// Contexts start by ucontext and then switch by _setjmp, which unlike swapcontext makes no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<std::byte[]> stack;
  dim3 index;
  int warp = 0, lane = 0, exchanges = 0, syncs = 0;
  size_t shared_used = 0;
  bool done = false;
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void launch(dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed, const std::function<void()>& body) {
    random_.seed(seed);
    grid_ = grid, block_ = block, body_ = &body;
    const size_t blocks = size_t(grid.x) * grid.y * grid.z;
    std::vector<size_t> order(blocks);
    for (size_t i = 0; i < blocks; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    for (const size_t i : order) {
      block_index_ = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
      run_block(shared_bytes);
    }
  }

  Fiber& self() { return fibers_[size_t(current_)]; }
  const dim3& thread_index() { return self().index; }
  const dim3& block_index() const { return block_index_; }
  const dim3& block_dim() const { return block_; }
  const dim3& grid_dim() const { return grid_; }
  unsigned char* shared_memory() { return shared_.get(); }
  Group& warp() { return warps_[size_t(self().warp)]; }
  Group& block() { return everyone_; }

  // Blocks until all threads of `group` are here, all `doing` the same.
  void wait(Group& group, const char* doing) {
    if (group.arrived == 0) group.doing = doing;
    if (std::strcmp(group.doing, doing) != 0)
      fail(std::string("threads of one group are in '") + group.doing + "' and in '" + doing + "'");
    if (++group.arrived < group.size) {
      group.waiting.push_back(current_);
      give_way();
      return;
    }
    group.arrived = 0;
    runnable_.insert(runnable_.end(), group.waiting.begin(), group.waiting.end());
    group.waiting.clear();
    yield();
  }

  // Lets other threads overtake.
  void yield() {
    runnable_.push_back(current_);
    give_way();
  }

 private:
  void run_block(size_t shared_bytes) {
    const int threads = int(block_.x * block_.y * block_.z);
    if (threads % kWarpSize != 0) throw std::runtime_error("block size is not a multiple of the warp size");
    shared_.reset(static_cast<unsigned char*>(std::aligned_alloc(16, (shared_bytes + 31) / 16 * 16)));
    std::memset(shared_.get(), 0xcd, shared_bytes);
    if (int(fibers_.size()) < threads) fibers_.resize(size_t(threads));
    warps_ = std::vector<Group>(size_t(threads / kWarpSize));
    everyone_ = Group();
    everyone_.size = threads;
    failure_.clear();
    runnable_.clear();
    for (int i = 0; i < threads; ++i) start(i);
    for (int left = threads; left > 0;) {
      if (runnable_.empty() && failure_.empty()) failure_ = "deadlock: threads wait in '" + waiting_in() + "'";
      if (!failure_.empty()) throw std::runtime_error(failure_);
      std::swap(runnable_[random_() % runnable_.size()], runnable_.back());
      current_ = runnable_.back();
      runnable_.pop_back();
      resume();
      left -= self().done;
    }
  }

  void start(int i) {
    Fiber& fiber = fibers_[size_t(i)];
    if (!fiber.stack) fiber.stack.reset(new std::byte[kStackBytes]);
    fiber.index = {unsigned(i) % block_.x, unsigned(i) / block_.x % block_.y, unsigned(i) / block_.x / block_.y};
    fiber.warp = i / kWarpSize, fiber.lane = i % kWarpSize;
    fiber.exchanges = fiber.syncs = 0;
    fiber.shared_used = 0;
    fiber.done = fiber.started = false;
    ++warps_[size_t(fiber.warp)].size;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Machine::enter, 0);
    runnable_.push_back(i);
  }

  static void enter() {
    Machine& machine = get();
    (*machine.body_)();
    machine.self().done = true;
    _longjmp(machine.scheduler_, 1);
  }

  // From the scheduler to the current fiber, until that gives way.
  void resume() {
    if (_setjmp(scheduler_) != 0) return;
    if (self().started) _longjmp(self().place, 1);
    self().started = true;
    setcontext(&self().start);
  }
  void give_way() {
    if (_setjmp(self().place) == 0) _longjmp(scheduler_, 1);
  }

  // Only the scheduler may throw: an exception cannot cross fibers.
  void fail(const std::string& what) {
    failure_ = what;
    give_way();
  }

  std::string waiting_in() const {
    if (everyone_.arrived > 0) return everyone_.doing;
    for (const Group& warp : warps_)
      if (warp.arrived > 0) return warp.doing;
    return "";
  }

  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };

  std::mt19937_64 random_;
  dim3 grid_, block_, block_index_;
  const std::function<void()>* body_ = nullptr;
  std::unique_ptr<unsigned char, Free> shared_;
  std::vector<Fiber> fibers_;
  std::vector<Group> warps_;
  Group everyone_;
  std::vector<int> runnable_;
  std::string failure_;
  jmp_buf scheduler_;
  int current_ = 0;
};

inline unsigned char* shared_memory() { return Machine::get().shared_memory(); }
inline int lane() { return Machine::get().self().lane; }

// What SharedMemory of csrc/common/device.cuh is made of: divides the block's memory anew, and takes the next array.
inline void start_sharing() { Machine::get().self().shared_used = 0; }
inline unsigned char* share(size_t bytes, const char*) {
  Fiber& fiber = Machine::get().self();
  unsigned char* const array = shared_memory() + fiber.shared_used;
  fiber.shared_used += (bytes + 15) / 16 * 16;
  return array;
}

// The exchange on which every warp collective is built: each lane gives a value and gets all 32. `doing` names the
// collective; lanes in different ones are an error.
template <class V>
std::array<V, kWarpSize> gather(const char* doing, const V& mine) {
  static_assert(std::is_trivially_copyable_v<V> && sizeof(V) <= kExchangeBytes);
  Machine& machine = Machine::get();
  Group& warp = machine.warp();
  auto& slots = warp.slots[machine.self().exchanges++ % 2];
  std::memcpy(slots[lane()], &mine, sizeof(V));
  machine.wait(warp, doing);
  std::array<V, kWarpSize> all;
  for (int i = 0; i < kWarpSize; ++i) std::memcpy(&all[size_t(i)], slots[i], sizeof(V));
  return all;
}

inline void require_full(unsigned mask) {
  if (mask != 0xffffffffu) std::abort();  // no kernel of ours uses part of a warp
}

// What kernels are started with on the host; csrc/common/launch.h has the one for the device.
struct Launcher {
  uint64_t seed;

  template <class... Parameters, class... Arguments>
  void operator()(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...), const Arguments&... args) {
    Machine::get().launch(grid, block, shared_bytes, seed++, [&] { kernel(args...); });
  }
  void zero(void* p, size_t bytes) { std::memset(p, 0, bytes); }
};

}  // namespace simt

#define threadIdx (simt::Machine::get().thread_index())
#define blockIdx (simt::Machine::get().block_index())
#define blockDim (simt::Machine::get().block_dim())
#define gridDim (simt::Machine::get().grid_dim())

#include "intrinsics.h"
