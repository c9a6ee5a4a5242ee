// See cluster.h. Blocks of a cluster run together once they have met at its barrier, and until they have met there
// again: whoever enters another's shared memory before or after may find that it is not there.
#include "cluster.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.h"

namespace simt {

namespace {

// Addresses as map_shared makes them.
constexpr int kOffsetBits = 24;

std::string at(Pc pc) { return "\n            at <+" + std::to_string(pc) + ">"; }

}  // namespace

// ---- the barrier ----------------------------------------------------------------------------------------------------

void Machine::arrive_at_cluster(Pc pc) {
  Fiber& me = *current;
  ClusterBarrier& barrier = cluster_barrier_;
  if (me.at_cluster_barrier)
    fail("a thread arrives again at the cluster's barrier, and has not waited\n  thread    " + describe(me) + at(pc));
  if (exited_ > 0) {
    const std::span<Fiber> all = all_fibers();
    const auto gone = std::find_if(all.begin(), all.end(), [](const Fiber& fiber) { return fiber.done; });
    fail("divergent cluster barrier: a thread has exited, and others arrive\n  exited    " + describe(*gone) +
         "\n  arrives   " + describe(me) + at(pc));
  }
  Row row = me.seen;
  row[size_t(me.lane)] = me.clock;
  barrier.seen.add(own_key(me), base(), me.warp, row);
  // Few of the threads know something of their own besides.
  if (me.known && std::find(barrier.joined.begin(), barrier.joined.end(), me.known) == barrier.joined.end()) {
    barrier.seen.add(*me.known);
    barrier.joined.push_back(me.known);
  }
  me.known_at_arrival = me.known;
  me.clock = ++latest_;
  me.at_cluster_barrier = true;
  if (++barrier.arrived < cluster_blocks() * threads()) return;
  ++barrier.phases;
  barrier.completed = std::make_shared<Knowledge>(std::exchange(barrier.seen, {}));
  barrier.joined.clear();
  barrier.arrived = 0;
  for (const int i : barrier.waiting) runnable_.push_back(i);
  barrier.waiting.clear();
}

void Machine::wait_for_cluster(Pc pc) {
  Fiber& me = *current;
  ClusterBarrier& barrier = cluster_barrier_;
  if (!me.at_cluster_barrier)
    fail("a thread waits for the cluster's barrier, and has not arrived\n  thread    " + describe(me) + at(pc));
  if (barrier.phases == me.cluster_phases) {
    barrier.waiting.push_back(me.number);
    me.waits_in = "barrier.cluster.wait", me.waits_at = {};
    give_way();
  }
  ++me.cluster_phases;
  me.at_cluster_barrier = false;
  me.known = me.known == me.known_at_arrival ? barrier.completed : joined(me.known, barrier.completed);
}

void Machine::leave_cluster() {
  const Fiber& me = *current;
  if (me.at_cluster_barrier)
    fail("a thread exits, and has not waited for the cluster's barrier\n  thread    " + describe(me));
  if (cluster_barrier_.arrived > 0) {
    const std::span<Fiber> all = all_fibers();
    const auto other =
        std::find_if(all.begin(), all.end(), [](const Fiber& fiber) { return fiber.at_cluster_barrier; });
    fail("divergent cluster barrier: a thread exits, and others have arrived\n  exits     " + describe(me) +
         "\n  arrived   " + describe(*other));
  }
  if (block_of(me).exited + 1 == threads()) memory_.require_left(me.rank);
}

// ---- other blocks' shared memory ------------------------------------------------------------------------------------

unsigned char* Memory::visit(int rank, size_t offset, size_t size, Access access, Pc pc) {
  Machine& machine = Machine::get();
  Arena& arena = arenas_[size_t(rank)];
  unsigned char* const p = arena.memory.get() + offset;
  require_aligned(p, size, "access", pc);
  if (rank != current->rank) {
    if (current->cluster_phases == 0)
      fail("access to a block that may not have begun", p, size, access, pc,
           "\n  hint      the blocks have not met at the cluster's barrier yet");
    if (machine.has_exited(rank)) fail("access to a block that has exited", p, size, access, pc);
    // The next phase that the current fiber arrives for.
    const int needed = current->cluster_phases + (current->at_cluster_barrier ? 2 : 1);
    if (needed > arena.last_visit.phases_needed) arena.last_visit = {needed, current->number, pc};
    const SharedArray* const here = own().array_at(current->shared, offset, size);
    const SharedArray* const there = arena.array_at(layout_of(arena), offset, size);
    if (here && there && (here->begin != there->begin || std::strcmp(here->name, there->name) != 0))
      fail("blocks of a cluster divide their shared memory differently", p, size, access, pc,
           "\n  here      '" + std::string(here->name) + "' lies there");
  }
  touch_shared(arena, offset, size, access, pc);
  return p;
}

void Memory::require_left(int rank) {
  Machine& machine = Machine::get();
  const Arena::Visit& last = arenas_[size_t(rank)].last_visit;
  if (last.phases_needed <= machine.cluster_phases()) return;
  machine.fail("a block exits while another may still be in its shared memory\n  exits     " +
               machine.describe(*current) + "\n  visitor   " +
               machine.describe(machine.all_fibers()[size_t(last.fiber)]) + at(last.pc) +
               "\n  hint      the cluster's barrier must come between a block's last visit and its end");
}

// ---- what cluster.h promises ----------------------------------------------------------------------------------------

int cluster_rank() { return current->rank; }

void arrive_at_cluster() { Machine::get().arrive_at_cluster(pc_of(__builtin_return_address(0))); }
void wait_for_cluster() { Machine::get().wait_for_cluster(pc_of(__builtin_return_address(0))); }

uint32_t map_shared(const void* shared, int rank) {
  Machine& machine = Machine::get();
  if (!machine.memory().is_shared(shared))
    machine.fail("mapa of what is not the block's shared memory: " + machine.memory().describe(shared) +
                 at(pc_of(__builtin_return_address(0))));
  if (rank < 0 || rank >= machine.cluster_blocks())
    machine.fail("mapa to block " + std::to_string(rank) + " of a cluster of " +
                 std::to_string(machine.cluster_blocks()) + "\n  thread    " + machine.describe(*current) +
                 at(pc_of(__builtin_return_address(0))));
  return uint32_t(rank) << kOffsetBits | shared_offset(shared);
}

namespace {

unsigned char* visit(uint32_t address, Access access, Pc pc) {
  return Machine::get().memory().visit(int(address >> kOffsetBits), address & ((1u << kOffsetBits) - 1),
                                       sizeof(uint32_t), access, pc);
}

}  // namespace

uint32_t load_cluster(uint32_t address) {
  uint32_t value;
  std::memcpy(&value, visit(address, Access::read, pc_of(__builtin_return_address(0))), sizeof(value));
  return value;
}

void store_cluster(uint32_t address, uint32_t value) {
  std::memcpy(visit(address, Access::write, pc_of(__builtin_return_address(0))), &value, sizeof(value));
}

}  // namespace simt
