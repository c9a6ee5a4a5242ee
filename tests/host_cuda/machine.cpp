#include "machine.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <numeric>
#include <utility>

namespace simt {

Fiber* current = nullptr;

std::string describe(const Site& site) {
  return site.file ? std::string(site.file) + ":" + std::to_string(site.line) : "csrc/ptx";
}
std::string describe(dim3 index) {
  return std::string("(") + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

namespace {

constexpr size_t kPageBytes = 64 << 10;  // the largest that Linux uses

dim3 unflatten(size_t i, dim3 size) {
  return {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
}

size_t count(dim3 size) { return size_t(size.x) * size.y * size.z; }

std::string lanes_text(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", mask);
  return text;
}

}  // namespace

// ---- launches -------------------------------------------------------------------------------------------------------

void Machine::begin_call(uint64_t seed) {
  call_seed_ = seed;
  launches_.clear();
  constexpr Clock kLate = 1u << 31;
  const bool rewind = latest_ > kLate;
  if (rewind) latest_ = 0;
  memory_.begin_call(rewind);
}

void Machine::launch(const Launch& launch) {
  launch_ = &launch;
  failure_.clear();
  if (threads() % kWarpSize != 0 || threads() == 0 || threads() > 1024)
    throw Failure(
        complaint("a block of " + std::to_string(threads()) + " threads: must be 32 to 1024, in whole warps"));
  if (count(launch.grid) == 0) throw Failure(complaint("a grid of no blocks"));
  if (launch.grid.y > 65535 || launch.grid.z > 65535) throw Failure(complaint("a grid of more than 65535 in y or z"));
  if (launch.cluster == 0 || launch.cluster > kMostClusterBlocks || launch.grid.x % launch.cluster != 0)
    throw Failure(complaint("clusters of " + std::to_string(launch.cluster) + " blocks: must be 1 to " +
                            std::to_string(kMostClusterBlocks) + ", and divide the grid in x"));
  if (launch.shared_bytes > launch.granted_bytes)
    throw Failure(complaint(std::to_string(launch.shared_bytes) + " bytes of shared memory: some devices grant " +
                            std::to_string(launch.granted_bytes >> 10) + " KiB"));
  random_.seed(launch.seed);
  launch_begin_ = latest_ + 1;
  cluster_begins_.clear();
  memory_.begin_launch();
  cluster_order_.resize(count(launch.grid) / launch.cluster);
  std::iota(cluster_order_.begin(), cluster_order_.end(), size_t(0));
  std::shuffle(cluster_order_.begin(), cluster_order_.end(), random_);
  for (const size_t i : cluster_order_) run_cluster(i);
  launches_.push_back({threads(), cluster_blocks()});
}

dim3 Machine::block_index(size_t cluster, int rank) const {
  return unflatten(cluster * launch_->cluster + size_t(rank), launch_->grid);
}

void Machine::run_cluster(size_t number) {
  const int count = cluster_blocks() * threads();
  memory_.begin_cluster(cluster_blocks(), launch_->shared_bytes);
  if (int(fibers_.size()) < count) fibers_.resize(size_t(count));
  const Clock begin = ++latest_;
  cluster_begins_.push_back(begin);
  blocks_.assign(size_t(cluster_blocks()), {});
  for (int rank = 0; rank < cluster_blocks(); ++rank) {
    Block& block = blocks_[size_t(rank)];
    block.index = block_index(number, rank);
    block.warps.resize(size_t(threads() / kWarpSize));
    block.barriers.resize(kNamedBarriers);
    block.base = begin;
  }
  cluster_barrier_ = {};
  mbarriers_.clear();
  runnable_.clear();
  exited_ = 0;
  for (int i = 0; i < count; ++i) start(i);
  while (exited_ < count) {
    if (runnable_.empty() && failure_.empty()) failure_ = complaint(deadlock());
    if (!failure_.empty()) throw Failure(failure_);
    std::swap(runnable_[random_() % runnable_.size()], runnable_.back());
    current = &fibers_[size_t(runnable_.back())];
    runnable_.pop_back();
    resume();
    current = nullptr;
  }
  const size_t n_warps = size_t(threads() / kWarpSize);
  for (const Block& block : blocks_) {
    for (size_t i = 0; i < n_warps; ++i) {
      if (block.warps[i].products != (i / 4 * 4 + 3 < n_warps ? block.warps[i / 4 * 4].products : 0))
        throw Failure(complaint(std::string("wgmma by some warps of warpgroup ") + std::to_string(i / 4) + " only"));
    }
  }
}

// ---- fibers ---------------------------------------------------------------------------------------------------------

Stack::Stack() {
  void* const pages =
      mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED || mprotect(pages, kPageBytes, PROT_NONE) != 0) throw std::bad_alloc();
  begin_ = static_cast<std::byte*>(pages) + kPageBytes;
}
Stack::~Stack() { munmap(begin_ - kPageBytes, kPageBytes + kStackBytes); }

void Machine::start(int i) {
  Fiber& fiber = fibers_[size_t(i)];
  std::unique_ptr<Stack> stack = std::move(fiber.stack);
  if (!stack) stack = std::make_unique<Stack>();
  fiber = Fiber();
  fiber.stack = std::move(stack);
  const int own = i % threads();
  fiber.number = i, fiber.rank = i / threads(), fiber.lane = own % kWarpSize;
  fiber.warp = fiber.rank * kWarpNumbers + own / kWarpSize;
  fiber.index = unflatten(size_t(own), launch_->block);
  fiber.clock = block_of(fiber).base;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack->begin();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, &Machine::enter, 0);
  runnable_.push_back(i);
}

void Machine::enter() {
  Machine& machine = get();
  machine.launch_->run(machine.launch_->body);
  machine.leave();
  _longjmp(machine.scheduler_, 1);
}

// Collectives do not wait for lanes that have exited; a barrier that does is an error.
void Machine::leave() {
  if (!current->products.empty())
    fail("a thread exits and has not waited for its wgmma\n  thread    " + describe(*current));
  leave_cluster();
  current->done = true;
  ++exited_;
  ++block_of(*current).exited;
  const Barrier& barrier = block_of(*current).barriers[0];
  if (!barrier.waiting.empty()) {
    const Fiber& other = fibers_[size_t(barrier.waiting.front())];
    fail("divergent barrier: a thread exits while others wait\n  exits     " + describe(*current) + "\n  waits     " +
         describe(other) + "\n            in " + barrier.name + " at " + simt::describe(other.waits_at));
  }
  Warp& warp = this->warp(current->warp);
  warp.exited |= 1u << current->lane;
  const auto ends = [&](const Meeting& meeting) { return (meeting.mask & ~warp.exited & ~meeting.arrived) == 0; };
  for (const Meeting& meeting : warp.meetings)
    if (ends(meeting)) complete(meeting);
  std::erase_if(warp.meetings, ends);
}

// From the scheduler to the current fiber, until that gives way.
void Machine::resume() {
  if (_setjmp(scheduler_) != 0) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  setcontext(&current->start);
}

void Machine::give_way() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler_, 1);
}

void Machine::yield() {
  runnable_.push_back(current->number);
  give_way();
}

// Only the scheduler may throw: an exception cannot cross fibers.
void Machine::fail(const std::string& what) {
  failure_ = complaint(what);
  _longjmp(scheduler_, 1);
}

// ---- barriers -------------------------------------------------------------------------------------------------------

int Machine::synchronise(const char* name, int id, int count, bool predicate, Site site, bool wait) {
  Fiber& me = *current;
  if (id < 0 || id >= kNamedBarriers || count <= 0 || count % kWarpSize != 0 || count > threads())
    fail(std::string(name) + " of barrier " + std::to_string(id) + " for " + std::to_string(count) +
         " threads: barriers are 0 to 15, for whole warps of the block\n  caller    " + describe(me) +
         "\n            at " + simt::describe(site));
  Barrier& barrier = block_of(me).barriers[size_t(id)];
  if (barrier.arrived == 0) barrier.name = name, barrier.site = site, barrier.expected = count;
  const bool whole_block = id == 0;
  const auto differ = [&](const std::string& how) {
    fail("divergent barrier: " + how + "\n  one       " + describe(fibers_[size_t(barrier.members.front())]) +
         "\n            in " + barrier.name + " at " + simt::describe(barrier.site) + "\n  another   " + describe(me) +
         "\n            in " + name + " at " + simt::describe(site));
  };
  if (barrier.expected != count) differ("threads expect different counts");
  if (whole_block && (barrier.site.line != site.line || std::strcmp(barrier.site.file, site.file) != 0))
    differ("threads of the block are at different barriers");
  if (whole_block && block_of(me).exited > 0) {
    const std::span<Fiber> all = fibers_of(me.rank);
    const auto gone = std::find_if(all.begin(), all.end(), [](const Fiber& fiber) { return fiber.done; });
    fail("divergent barrier: a thread has exited, and others wait\n  exited    " + describe(*gone) + "\n  waits     " +
         describe(me) + "\n            in " + name + " at " + simt::describe(site));
  }
  barrier.members.push_back(me.number);
  barrier.positive += predicate;
  if (!whole_block) {
    barrier.seen.add(own_knowledge(me));
    me.clock = ++latest_;
  }
  if (wait) {
    barrier.waiting.push_back(me.number);
    me.waits_in = name, me.waits_at = site;
  }
  if (++barrier.arrived == count) complete(barrier);
  if (wait) give_way();
  return me.answer;
}

void Machine::complete(Barrier& barrier) {
  if (int(barrier.waiting.size()) == threads()) {
    Block& block = block_of(fibers_[size_t(barrier.waiting.front())]);
    block.last_barrier = barrier.site;
    ++block.epoch;
    share_knowledge(barrier.waiting);
    block.base = ++latest_;
    for (const int i : barrier.waiting) fibers_[size_t(i)].clock = block.base;
  } else {
    const auto seen = std::make_shared<Knowledge>(barrier.seen);
    for (const int i : barrier.waiting) fibers_[size_t(i)].known = joined(fibers_[size_t(i)].known, seen);
    if (!barrier.waiting.empty()) share_knowledge(barrier.waiting);
  }
  for (const int i : barrier.waiting) {
    fibers_[size_t(i)].answer = barrier.positive;
    runnable_.push_back(i);
  }
  barrier.arrived = barrier.positive = 0;
  barrier.seen = {};
  barrier.members.clear();
  barrier.waiting.clear();
}

Mbarrier& Machine::mbarrier(const void* place) {
  Mbarrier& found = mbarriers_[place];
  if (found.warp == 0) {
    std::vector<Warp>& warps = block_of(*current).warps;
    found.warp = current->rank * kWarpNumbers + int(warps.size());
    warps.emplace_back();
  }
  return found;
}

void Machine::arrive(Mbarrier& barrier) {
  barrier.seen.add(own_knowledge(*current));
  current->clock = ++latest_;
  complete_if_due(barrier);
}

void Machine::begin_copy(const Mbarrier& barrier) {
  copies_for_ = current;
  if (!copier_.stack) copier_.stack = std::make_unique<Stack>();
  copier_.number = current->number, copier_.rank = current->rank;
  copier_.index = current->index, copier_.warp = barrier.warp;
  copier_.shared = current->shared;
  copier_.known = std::make_shared<Knowledge>(own_knowledge(*current));
  current->clock = ++latest_;
  copier_.clock = ++latest_;
  current = &copier_;
}

void Machine::end_copy(Mbarrier& barrier, int64_t bytes) {
  Row row{};
  row[0] = copier_.clock;
  barrier.seen.add(own_key(copier_), base(), barrier.warp, row);
  current = copies_for_;
  barrier.bytes -= bytes;
  complete_if_due(barrier);
}

void Machine::complete_if_due(Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  ++barrier.phases;
  barrier.pending = barrier.expected;
  barrier.completed = joined(barrier.completed, std::make_shared<Knowledge>(std::exchange(barrier.seen, {})));
  for (const int i : barrier.waiting) runnable_.push_back(i);
  barrier.waiting.clear();
}

void Machine::wait(Mbarrier& barrier, int parity) {
  if (barrier.phases % 2 == parity) {
    barrier.waiting.push_back(current->number);
    current->waits_in = parity ? "mbarrier, odd phase" : "mbarrier, even phase", current->waits_at = {};
    give_way();
  }
  current->known = joined(current->known, barrier.completed);
}

// ---- warp collectives -----------------------------------------------------------------------------------------------

void Machine::meet(const char* name, unsigned mask, void* given, void (*act)(const Meeting&), Site site) {
  Fiber& me = *current;
  Warp& warp = this->warp(me.warp);
  const unsigned my_lane = 1u << me.lane;
  const auto where = [&] { return "\n            in " + std::string(name) + " at " + simt::describe(site); };
  if (!(mask & my_lane))
    fail("warp mask " + lanes_text(mask) + " does not name the lane that gives it\n  caller    " + describe(me) +
         where());
  auto open = std::find_if(warp.meetings.begin(), warp.meetings.end(),
                           [&](const Meeting& meeting) { return (meeting.mask & mask) != 0; });
  if (open == warp.meetings.end()) {
    open = warp.meetings.insert(open, {name, site, act, me.warp, mask, 0});
  } else if (open->mask != mask || std::strcmp(open->name, name) != 0) {
    fail("lanes disagree\n  one       lanes " + lanes_text(open->arrived) + " of mask " + lanes_text(open->mask) +
         "\n            in " + open->name + " at " + simt::describe(open->site) + "\n  another   " + describe(me) +
         " with mask " + lanes_text(mask) + where());
  }
  open->arrived |= my_lane;
  me.given = given;
  me.waits_in = name, me.waits_at = site;
  if ((mask & ~warp.exited & ~open->arrived) == 0) {
    const Meeting meeting = *open;
    warp.meetings.erase(open);
    complete(meeting);
  }
  give_way();
}

void Machine::complete(const Meeting& meeting) {
  if (meeting.act) meeting.act(meeting);
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (meeting.arrived >> lane & 1) runnable_.push_back(fiber(meeting.warp, lane).number);
}

// __syncwarp: what each lane of `mask` has seen is seen by all of them.
void Machine::order_warp(int warp, unsigned mask) {
  Row seen{};
  std::array<int, kWarpSize> lanes;
  size_t count = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Fiber& one = fiber(warp, lane);
    for (size_t i = 0; i < seen.size(); ++i) seen[i] = std::max(seen[i], one.seen[i]);
    seen[size_t(lane)] = one.clock;
    lanes[count++] = one.number;
  }
  const std::span<const int> members(lanes.data(), count);
  share_knowledge(members);
  ++latest_;
  for (const int i : members) fibers_[size_t(i)].seen = seen, fibers_[size_t(i)].clock = latest_;
  if (mask == kFullMask) this->warp(warp).last_sync = latest_;
}

// ---- order ----------------------------------------------------------------------------------------------------------

size_t Machine::cluster_at(Clock clock) const {
  return size_t(std::upper_bound(cluster_begins_.begin(), cluster_begins_.end(), clock) - cluster_begins_.begin()) - 1;
}

bool Machine::ordered(const Stamp& stamp, int lane, const void* word) {
  const Fiber& me = *current;
  if (stamp.clock >= base() && stamp.warp == me.warp &&
      (stamp.clock < warp(me.warp).last_sync || me.seen[size_t(lane)] >= stamp.clock || lane == me.lane))
    return true;
  if (!me.known) return false;
  const uint32_t block = block_key(cluster_at(stamp.clock), stamp.warp / kWarpNumbers);
  return me.known->covers(block, stamp.warp, lane, stamp.clock) ||
         (stamp.access == Access::atomic && me.known->observed(word, stamp.clock));
}

Knowledge Machine::own_knowledge(const Fiber& fiber) const {
  Row row = fiber.seen;
  row[size_t(fiber.lane)] = fiber.clock;
  Knowledge own(own_key(fiber), block_of(fiber).base, fiber.warp, row);
  if (fiber.known) own.add(*fiber.known);
  return own;
}

// Makes known what atomics have brought, and fixes what the next atomic releases.
void Machine::fence() {
  Fiber& me = *current;
  me.known = joined(me.known, me.acquired);
  me.fenced = std::make_shared<Knowledge>(own_knowledge(me));
  me.clock = ++latest_;
}

void Machine::release_and_acquire(const void* address, size_t bytes) {
  Fiber& me = *current;
  Known& released = memory_.released(address);
  me.acquired = joined(me.acquired, released);
  if (!me.fenced) return;
  auto next = std::make_shared<Knowledge>(*joined(released, me.fenced));
  for (size_t i = 0; i < bytes; i += kWordBytes) next->observe(static_cast<const std::byte*>(address) + i, latest_);
  released = next;
}

// Barriers pass on what their threads know of others, and the two halves of a fence: CUDA code fences in all threads,
// then lets one of them, behind a barrier, do the atomic.
void Machine::share_knowledge(std::span<const int> fibers) {
  for (Known Fiber::* const part : {&Fiber::known, &Fiber::fenced, &Fiber::acquired}) {
    const Known& first = fibers_[size_t(fibers.front())].*part;
    if (std::all_of(fibers.begin(), fibers.end(), [&](int i) { return fibers_[size_t(i)].*part == first; })) continue;
    auto all = std::make_shared<Knowledge>();
    for (const int i : fibers)
      if (fibers_[size_t(i)].*part) all->add(*(fibers_[size_t(i)].*part));
    for (const int i : fibers) fibers_[size_t(i)].*part = all;
  }
}

// ---- reports --------------------------------------------------------------------------------------------------------

std::string Machine::describe_thread(int number, dim3 block) const {
  return "thread " + simt::describe(unflatten(size_t(number), launch_->block)) + " of block " + simt::describe(block) +
         ", warp " + std::to_string(number / kWarpSize) + " lane " + std::to_string(number % kWarpSize);
}

std::string Machine::describe(const Fiber& fiber) const {
  return describe_thread(fiber.number % threads(), block_of(fiber).index);
}

// Who left a stamp in this launch.
std::string Machine::describe_author(const Stamp& stamp, int lane) const {
  const int warp = stamp.warp % kWarpNumbers;
  if (warp >= threads() / kWarpSize) return "a bulk copy that was not waited for";
  const size_t cluster = cluster_order_[cluster_at(stamp.clock)];
  return describe_thread(warp * kWarpSize + lane, block_index(cluster, stamp.warp / kWarpNumbers));
}

std::string Machine::describe_epoch() const {
  const Block& block = block_of(*current);
  if (block.epoch == 0) return "none since the block began";
  return "none since barrier " + std::to_string(block.epoch) + " of the block, at " +
         simt::describe(block.last_barrier);
}

std::string Machine::deadlock() const {
  struct Group {
    int threads = 0, first = 0;
  };
  std::map<std::string, Group> groups;
  for (int i = cluster_blocks() * threads() - 1; i >= 0; --i) {
    const Fiber& fiber = fibers_[size_t(i)];
    if (fiber.done) continue;
    Group& group = groups[std::string(fiber.waits_in) + " at " + simt::describe(fiber.waits_at)];
    ++group.threads, group.first = i;
  }
  std::string text = "deadlock: all threads wait";
  for (const auto& [where, group] : groups)
    text += "\n  waits     " + std::to_string(group.threads) + " threads in " + where + "\n            the first is " +
            describe(fibers_[size_t(group.first)]);
  return text;
}

std::string Machine::complaint(const std::string& what) const {
  return what + "\n  kernel    <" + "@" + std::to_string(pc_of(launch_->kernel) + 1) + ">, grid " +
         simt::describe(launch_->grid) + ", block " + simt::describe(launch_->block) +
         "\n  replay    host_cuda.seed = " + std::to_string(call_seed_) + ", launch " +
         std::to_string(launches_.size()) + " of the call";
}

// ---- what simt.h promises -------------------------------------------------------------------------------------------

dim3 thread_index() { return current->index; }
dim3 block_index() { return Machine::get().block_of(*current).index; }
dim3 block_dim() { return Machine::get().launched().block; }
dim3 grid_dim() { return Machine::get().launched().grid; }

unsigned char* shared_memory() { return Machine::get().memory().shared(); }
void start_sharing() { Machine::get().memory().start_sharing(); }
unsigned char* share(size_t bytes, const char* name, size_t alignment) {
  return Machine::get().memory().share(bytes, name, alignment);
}
unsigned char* share_static(size_t bytes, const char* name, const char* function) {
  return Machine::get().memory().share_static(bytes, name, function);
}
void launch(const Launch& launch) { Machine::get().launch(launch); }
void zero(void* p, size_t bytes) { Machine::get().memory().zero(p, bytes); }

}  // namespace simt
