#include "memory.h"

#include <link.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "machine.h"

namespace simt {

namespace {

constexpr size_t kRedZone = 64, kMostArrays = 64;
// Of shared memory, and what the red zones before arrays so aligned take besides.
constexpr size_t kMostAlignment = 1024, kMostAligned = 4;
// What CUDA grants static arrays, and what the red zones between them take besides.
constexpr size_t kStaticShared = 48 << 10, kMostStatic = 16;

size_t rounded_up(size_t bytes) { return (bytes + 15) / 16 * 16; }

// Where this module lies: its constants may be read, and its addresses count from its beginning.
struct Module {
  uintptr_t begin = 0, end = 0;
};
Module find_module() {
  Module module;
  const auto visit = [](dl_phdr_info* info, size_t, void* result) {
    const auto here = reinterpret_cast<uintptr_t>(&find_module);
    Module found{info->dlpi_addr, 0};
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_LOAD)
        found.end = std::max(found.end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
    if (here < found.begin || here >= found.end) return 0;
    *static_cast<Module*>(result) = found;
    return 1;
  };
  dl_iterate_phdr(visit, &module);
  return module;
}
const Module kModule = find_module();

std::string at(Pc pc) { return "<+" + std::to_string(pc) + ">"; }

const char* name_of(Access access) {
  return access == Access::read ? "read" : access == Access::write ? "write" : "atomic";
}

std::string bytes_text(size_t count) { return std::to_string(count) + (count == 1 ? " byte" : " bytes"); }

}  // namespace

Pc pc_of(const void* return_address) { return Pc(reinterpret_cast<uintptr_t>(return_address) - 1 - kModule.begin); }

// ---- arrays ---------------------------------------------------------------------------------------------------------

Array::Array(std::string name_, unsigned char* data_, std::vector<int64_t> shape_, std::vector<int64_t> strides_,
             size_t element_, Role role_)
    : name(std::move(name_)),
      data(data_),
      shape(std::move(shape_)),
      strides(std::move(strides_)),
      element(element_),
      role(role_) {
  if (std::count(shape.begin(), shape.end(), 0) > 0) return;
  extent = run = element;
  for (size_t axis = 0; axis < shape.size(); ++axis) {
    if (shape[axis] == 1 || strides[axis] == 0) continue;
    dimensions.push_back({axis, size_t(strides[axis]) * element, size_t(shape[axis])});
    extent += dimensions.back().step * (dimensions.back().count - 1);
  }
  std::stable_sort(dimensions.begin(), dimensions.end(), [](auto& a, auto& b) { return a.step > b.step; });
  for (auto i = dimensions.rbegin(); i != dimensions.rend() && i->step == run; ++i) run *= i->count;
}

bool Array::owns(size_t offset, size_t size) const {
  if (offset + size > extent) return false;
  if (run == extent) return true;
  for (const Dimension& dimension : dimensions) {
    if (dimension.step < run) break;
    if (offset / dimension.step >= dimension.count) return false;
    offset %= dimension.step;
  }
  return offset + size <= run;
}

std::string Array::element_at(size_t offset) const {
  std::vector<size_t> index(shape.size(), 0);
  for (const Dimension& dimension : dimensions) {
    index[dimension.axis] = offset / dimension.step;
    offset %= dimension.step;
  }
  std::string text = name + "[";
  for (size_t i = 0; i < index.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(index[i]);
  text += "]";
  if (offset > 0) text += " + " + bytes_text(offset);
  return text;
}

void Array::watch() {
  written.assign(extent, 0);
  cells = {static_cast<Cell*>(std::calloc(extent / kWordBytes + 2, sizeof(Cell))), &std::free};
}

// ---- the caller's side ----------------------------------------------------------------------------------------------

void Memory::begin_call(bool rewind) {
  for (Arena& arena : arenas_)
    if (rewind) arena.room = 0;  // the next block gets new cells
  arrays_.clear();
  last_array_ = 0;
}

void Memory::add(Array array) {
  if (array.empty()) return;
  if (array.role != Role::input) array.watch();
  arrays_.push_back(std::move(array));
}

void Memory::end_call() {
  for (const Array& array : arrays_)
    for (size_t offset = 0; array.role == Role::output && offset < array.written.size(); ++offset)
      if (!array.written[offset] && array.owns(offset, 1))
        throw Failure("output " + array.element_at(offset) + " was never written");
}

void Memory::begin_cluster(int blocks, size_t shared_bytes) {
  released_in_block_.clear();
  granted_ = shared_bytes;
  if (arenas_.size() < size_t(blocks)) arenas_.resize(size_t(blocks));
  for (int rank = 0; rank < blocks; ++rank) arenas_[size_t(rank)].begin_block(shared_bytes);
}

void Arena::begin_block(size_t granted) {
  static_arrays.clear();
  last_visit = {};
  static_begin = rounded_up(granted) + kMostArrays * (kRedZone + 16) + kMostAligned * kMostAlignment;
  bytes = static_begin + kStaticShared + kMostStatic * kRedZone;
  if (bytes > room) {
    room = bytes;
    memory.reset(static_cast<unsigned char*>(
        std::aligned_alloc(kMostAlignment, (room + kMostAlignment - 1) / kMostAlignment * kMostAlignment)));
    cells.reset(static_cast<Cell*>(std::aligned_alloc(64, (room / kWordBytes + 2) * sizeof(Cell))));
    std::memset(static_cast<void*>(cells.get()), 0, (room / kWordBytes + 2) * sizeof(Cell));
    state.resize(room);
  }
  std::memset(memory.get(), 0xcd, bytes);
  std::fill_n(state.begin(), bytes, uint8_t(0));
}

void Memory::zero(void* p, size_t bytes) {
  for (Array& array : arrays_) {
    const size_t offset = size_t(static_cast<unsigned char*>(p) - array.data);
    if (array.role == Role::input || offset >= array.extent || !array.owns(offset, bytes)) continue;
    std::memset(p, 0, bytes);
    std::fill_n(array.written.begin() + std::ptrdiff_t(offset), bytes, uint8_t(1));
    return;
  }
  throw Failure("zero() of " + bytes_text(bytes) + " that are not all in one output: " + describe(p));
}

// ---- shared memory --------------------------------------------------------------------------------------------------

void Memory::start_sharing() {
  SharedLayout& layout = current->shared;
  layout.phase = layout.phase == Arena::kStaticPhase - 1 ? 1 : uint8_t(layout.phase + 1);
  layout.used = 0;
  layout.arrays.clear();
}

unsigned char* Memory::share(size_t bytes, const char* name, size_t alignment) {
  SharedLayout& layout = current->shared;
  layout.used += rounded_up(bytes);
  if (layout.used > granted_)
    Machine::get().fail("shared memory exceeded: with '" + std::string(name) + "' the block uses " +
                        bytes_text(layout.used) + ", and the launch asked for " + bytes_text(granted_));
  if (layout.arrays.size() == kMostArrays) Machine::get().fail("more than 64 shared arrays");
  size_t begin = 0;
  if (!layout.arrays.empty()) {
    const SharedArray& last = layout.arrays.back();
    begin = last.begin + rounded_up(last.bytes) + kRedZone;
    begin = (begin + alignment - 1) / alignment * alignment;
  }
  layout.arrays.push_back({name, begin, bytes});
  return shared() + begin;
}

unsigned char* Memory::share_static(size_t bytes, const char* name, const char* function) {
  std::vector<StaticArray>& arrays = own().static_arrays;
  size_t begin = own().static_begin, used = 0;
  for (const StaticArray& array : arrays) {
    if (std::strcmp(array.name, name) == 0 && std::strcmp(array.function, function) == 0) return shared() + array.begin;
    begin = array.begin + rounded_up(array.bytes) + kRedZone;
    used += rounded_up(array.bytes);
  }
  if (used + bytes > kStaticShared || arrays.size() == kMostStatic)
    Machine::get().fail("static shared memory exceeded: with '" + std::string(name) + "' the block uses " +
                        bytes_text(used + bytes) + " in " + std::to_string(arrays.size() + 1) +
                        " arrays; CUDA grants 48 KiB, this machine 16 arrays");
  arrays.push_back({{name, begin, bytes}, function});
  return shared() + begin;
}

int Memory::own_rank() { return current ? current->rank : 0; }

const SharedLayout& Memory::layout_of(const Arena& arena) const {
  const bool visiting = &arena != &own();
  return visiting ? Machine::get().fibers_of(int(&arena - arenas_.data())).front().shared : current->shared;
}

const SharedArray* Arena::array_at(const SharedLayout& layout, size_t offset, size_t size) const {
  const auto holds = [&](const SharedArray& array) {
    return offset >= array.begin && offset + size <= array.begin + array.bytes;
  };
  for (const SharedArray& array : layout.arrays)
    if (holds(array)) return &array;
  for (const SharedArray& array : static_arrays)
    if (holds(array)) return &array;
  return nullptr;
}

void Memory::begin_copy(void* to, const void* from, size_t size, bool valid, Pc pc) {
  require_aligned(to, size, "cp.async", pc);
  require_aligned(from, size, "cp.async", pc);  // also where nothing is read: PTX makes no exception
  if (!is_shared(to)) fail("cp.async to what is not shared memory", to, size, Access::write, pc);
  touch(to, size, Access::write, pc);
  AsyncCopy copy{static_cast<unsigned char*>(to), size, {}, -1, pc};
  if (valid) {
    touch(from, size, Access::read, pc);
    std::memcpy(copy.bytes, from, size);
  }
  current->copies.push_back(copy);
  std::fill_n(own().state.data() + own().offset(copy.to), size, Arena::kInFlight);
}

void Memory::commit_copies() {
  for (AsyncCopy& copy : current->copies)
    if (copy.group < 0) copy.group = current->copy_groups;
  ++current->copy_groups;
}

// The write counts as the waiting thread's, now: others need a barrier after this.
void Memory::finish_copies(int groups_left) {
  if (groups_left == 0) commit_copies();
  std::vector<AsyncCopy> left;
  for (const AsyncCopy& copy : current->copies) {
    if (copy.group < 0 || copy.group >= current->copy_groups - groups_left) {
      left.push_back(copy);
      continue;
    }
    std::fill_n(own().state.data() + own().offset(copy.to), copy.size, uint8_t(0));
    touch(copy.to, copy.size, Access::write, copy.pc);
    std::memcpy(copy.to, copy.bytes, copy.size);
  }
  current->copies = std::move(left);
}

// ---- detectors ------------------------------------------------------------------------------------------------------

void Memory::require_aligned(const void* p, size_t alignment, const char* what, Pc pc) {
  if (reinterpret_cast<uintptr_t>(p) % alignment == 0) return;
  fail(std::string("misaligned ") + what, p, alignment, Access::read, pc,
       "\n  aligned   not to the " + bytes_text(alignment) + " it needs");
}

void Memory::touch(const void* p, size_t size, Access access, Pc pc) {
  const auto address = static_cast<const unsigned char*>(p);
  const auto stack = reinterpret_cast<const unsigned char*>(current->stack->begin());
  if (size_t(address - stack) < kStackBytes) return;
  if (Arena& arena = own(); arena.holds(p)) return touch_shared(arena, arena.offset(p), size, access, pc);

  // Arrays may overlap (the inputs of one call can be views of one tensor): the first that has all of it counts.
  for (size_t i = 0; i < arrays_.size(); ++i) {
    const size_t which = (last_array_ + i) % arrays_.size();
    Array& array = arrays_[which];
    const size_t offset = size_t(address - array.data);
    if (offset >= array.extent || !array.owns(offset, size)) continue;
    last_array_ = which;
    return touch_array(array, offset, size, access, pc);
  }
  const auto place = reinterpret_cast<uintptr_t>(p);
  if (access == Access::read && place >= kModule.begin && place + size <= kModule.end) return;
  fail_outside(p, size, access, pc);
}

void Memory::touch_shared(Arena& arena, size_t offset, size_t size, Access access, Pc pc) {
  const unsigned char* const p = arena.memory.get() + offset;
  const SharedLayout& layout = layout_of(arena);
  const bool undivided = layout.arrays.empty() && !arena.is_static(offset);
  if (undivided ? offset + size > granted_ : !arena.array_at(layout, offset, size)) fail_outside(p, size, access, pc);
  const uint8_t phase = arena.is_static(offset) ? Arena::kStaticPhase : layout.phase;
  uint8_t* const state = arena.state.data() + offset;
  for (size_t i = 0; i < size; ++i) {
    if (state[i] == phase) continue;
    if (state[i] == Arena::kInFlight)
      fail("access to shared memory that cp.async is still writing", p + i, 1, access, pc,
           "\n  hint      the thread that began the copy has not waited for it");
    if (access != Access::write)
      fail("read of uninitialised shared memory", p + i, size, access, pc,
           "\n  hint      nobody has written it since it was divided, or not yet: a barrier may be missing");
    state[i] = phase;
  }
  stamp(arena.cells.get(), true, p, offset, size, access, pc);
}

void Memory::touch_array(Array& array, size_t offset, size_t size, Access access, Pc pc) {
  const unsigned char* const p = array.data + offset;
  if (array.role == Role::input) {
    if (access != Access::read) fail("write to an input", p, size, access, pc);
    return;  // what nobody writes cannot be raced for
  }
  uint8_t* const written = array.written.data() + offset;
  if (access != Access::write && std::memchr(written, 0, size))
    fail("read of an output that has not been written", p, size, access, pc);
  std::memset(written, 1, size);
  stamp(array.cells.get(), false, p, offset, size, access, pc);
}

void Memory::stamp(Cell* cells, bool shared, const void* p, size_t offset, size_t size, Access access, Pc pc) {
  for (size_t word = offset / kWordBytes, end = offset + size; word * kWordBytes < end; ++word) {
    const size_t from = std::max(offset, word * kWordBytes), to = std::min(end, (word + 1) * kWordBytes);
    const auto bytes = uint8_t(((1u << (to - from)) - 1) << (from - word * kWordBytes));
    stamp_word(cells[word], shared, static_cast<const unsigned char*>(p) + (from - offset), bytes, access, pc);
  }
}

void Memory::stamp_word(Cell& cell, bool shared, const void* p, uint8_t bytes, Access access, Pc pc) {
  Machine& machine = Machine::get();
  const Fiber& me = *current;
  const void* const word = static_cast<const unsigned char*>(p) - std::countr_zero(unsigned(bytes));
  const uint32_t my_lane = 1u << me.lane;
  Stamp* room = nullptr;
  bool merged = false;
  for (Stamp& other : cell.stamps) {
    // By the block itself since its last barrier, or by others: of the cluster, or of those that ran before.
    const bool of_cluster = other.clock >= machine.cluster_begin();
    const bool same_rank = other.warp / kWarpNumbers == me.rank;
    const bool of_block = of_cluster && same_rank && other.clock >= machine.base();
    const bool of_others = of_cluster ? !same_rank : !shared && other.clock >= machine.launch_begin();
    if (!of_block && !of_others) {
      if (!room) room = &other;
      continue;
    }
    if (!(other.bytes & bytes)) continue;
    const bool of_warp = of_block && other.warp == me.warp;
    const bool may_conflict = (access != Access::read || other.access != Access::read) &&
                              !(access == Access::atomic && other.access == Access::atomic);
    bool ordered = true;
    for (uint32_t lanes = of_warp ? other.lanes & ~my_lane : other.lanes; lanes != 0; lanes &= lanes - 1) {
      const int lane = __builtin_ctz(lanes);
      if (machine.ordered(other, lane, word)) continue;
      if (may_conflict && report_races) fail_race(other, lane, shared, of_block, p, access, pc);
      ordered = false;
      break;
    }
    const bool stronger = access == Access::write || access == other.access;
    if (ordered && stronger && (other.bytes & ~bytes) == 0) {
      if (room && room != &other) other.clock = 0;
      if (!room) room = &other;
    } else if (of_warp && other.clock == me.clock && other.access == access && other.bytes == bytes) {
      other.lanes |= my_lane;
      merged = true;
    }
  }
  if (merged) return;
  if (!room) room = &cell.stamps[3];
  *room = {me.clock, my_lane, pc, uint16_t(me.warp), bytes, access};
}

// ---- reports --------------------------------------------------------------------------------------------------------

// The array and element at `p`, or the nearest array and how far from it `p` lies.
std::string Memory::describe(const void* p) {
  const auto address = static_cast<const unsigned char*>(p);
  std::string nearest = "no array";
  size_t least = ~size_t(0);
  const auto consider = [&](const std::string& name, const unsigned char* begin, size_t bytes) {
    const bool before = address < begin;
    const size_t distance = before ? size_t(begin - address) : size_t(address - begin) - bytes;
    if (distance >= least) return;
    least = distance;
    nearest = bytes_text(distance) + (before ? " before '" : " behind '") + name + "' of " + bytes_text(bytes);
  };
  for (const Arena& arena : arenas_) {
    if (!arena.holds(p)) continue;
    const size_t offset = arena.offset(p);
    if (!current) return "shared memory at byte " + std::to_string(offset);
    const SharedLayout& layout = layout_of(arena);
    const std::string whose =
        &arena == &own() ? "" : ", of block " + std::to_string(&arena - arenas_.data()) + " of the cluster";
    if (const SharedArray* array = arena.array_at(layout, offset, 1))
      return "shared array '" + std::string(array->name) + "' at byte " + std::to_string(offset - array->begin) +
             " of " + std::to_string(array->bytes) + whose;
    if (layout.arrays.empty() && !arena.is_static(offset))
      return "shared memory at byte " + std::to_string(offset) + whose;
    const unsigned char* const begin = arena.memory.get();
    for (const SharedArray& array : layout.arrays) consider(array.name, begin + array.begin, array.bytes);
    for (const SharedArray& array : arena.static_arrays) consider(array.name, begin + array.begin, array.bytes);
    return "shared memory, " + nearest + whose;
  }
  for (const Array& array : arrays_) {
    if (address < array.data || address >= array.data + array.extent) {
      consider(array.name, array.data, array.extent);
      continue;
    }
    const auto offset = size_t(address - array.data);
    if (array.owns(offset, 1)) return "global array " + array.element_at(offset);
    return "between the rows of the view " + array.element_at(offset);
  }
  return nearest;
}

void Memory::fail(const std::string& problem, const void* p, size_t size, Access access, Pc pc,
                  const std::string& more) {
  const Machine& machine = Machine::get();
  Machine::get().fail(problem + "\n  place     " + describe(p) + "\n  " + name_of(access) +
                      std::string(10 - std::strlen(name_of(access)), ' ') + bytes_text(size) + " by " +
                      machine.describe(*current) + "\n            at " + at(pc) + more);
}

void Memory::fail_outside(const void* p, size_t size, Access access, Pc pc) {
  fail("access out of bounds", p, size, access, pc);
}

void Memory::fail_race(const Stamp& other, int lane, bool shared, bool of_block, const void* p, Access access, Pc pc) {
  const Machine& machine = Machine::get();
  const bool of_cluster = other.clock >= machine.cluster_begin();
  const std::string earlier = name_of(other.access);
  fail(of_block     ? (shared ? "data race in shared memory" : "data race in global memory")
       : of_cluster ? "data race between blocks of a cluster"
                    : "data race between blocks",
       p, kWordBytes, access, pc,
       "\n  " + earlier + std::string(10 - earlier.size(), ' ') + "before that by " +
           machine.describe_author(other, lane) + "\n            at " + at(other.pc) + "\n  order     " +
           (of_block     ? machine.describe_epoch()
            : of_cluster ? "none between these blocks since they last met"
                         : "none between blocks of a launch"));
}

}  // namespace simt
