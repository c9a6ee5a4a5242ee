// Barriers, warp collectives and atomics of intrinsics.h, and the host bodies of csrc/ptx (tensor_core.h).
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "tensor_core.h"

namespace simt {

namespace {

// Calls act(lane, what the lane gave) for the lanes that came, in order.
template <class Given, class Act>
void for_lanes(const Meeting& meeting, const Act& act) {
  for (int lane = 0; lane < kWarpSize; ++lane)
    if (meeting.arrived >> lane & 1) act(lane, *static_cast<Given*>(Machine::get().fiber(meeting.warp, lane).given));
}

void require_whole_warp(const Meeting& meeting) {
  if (meeting.arrived != kFullMask)
    Machine::get().fail(std::string(meeting.name) + " needs all lanes of the warp, and some have exited");
}

}  // namespace

int lane() { return current->lane; }

// ---- barriers -------------------------------------------------------------------------------------------------------

int synchronise_block(const char* name, bool predicate, Site at) {
  Machine& machine = Machine::get();
  return machine.synchronise(name, 0, machine.threads(), predicate, at);
}

void bar_sync(int id, int count, Site at) { Machine::get().synchronise("bar.sync", id, count, false, at); }
void bar_arrive(int id, int count, Site at) { Machine::get().synchronise("bar.arrive", id, count, false, at, false); }

// ---- collectives ----------------------------------------------------------------------------------------------------

namespace {

struct Shuffled {
  void* value;
  size_t bytes;
  int source;
  std::byte old[16];
};

struct Reduced {
  uint64_t value, result;
  Reduction reduction;
};

uint64_t combine(Reduction reduction, uint64_t a, uint64_t b) {
  switch (reduction) {
    case Reduction::add:
      return a + b;
    case Reduction::smallest:
      return std::min(a, b);
    case Reduction::largest:
      return std::max(a, b);
    case Reduction::smallest_signed:
      return uint64_t(std::min(int64_t(a), int64_t(b)));
    case Reduction::largest_signed:
      return uint64_t(std::max(int64_t(a), int64_t(b)));
    case Reduction::all:
      return a & b;
    case Reduction::any:
      return a | b;
    default:
      return a ^ b;
  }
}

void reduce_meeting(const Meeting& meeting) {
  uint64_t total = 0;
  bool first = true;
  for_lanes<Reduced>(meeting, [&](int lane, Reduced& mine) {
    if (mine.reduction == Reduction::ballot) {
      total |= mine.value << lane;
    } else if (mine.reduction == Reduction::match_any || mine.reduction == Reduction::match_all) {
      mine.result = 0;
      for_lanes<Reduced>(meeting,
                         [&](int i, Reduced& other) { mine.result |= uint64_t(other.value == mine.value) << i; });
      if (mine.reduction == Reduction::match_all && mine.result != meeting.arrived) mine.result = 0;
    } else {
      total = first ? mine.value : combine(mine.reduction, total, mine.value);
    }
    first = false;
  });
  for_lanes<Reduced>(meeting, [&](int, Reduced& mine) {
    if (mine.reduction != Reduction::match_any && mine.reduction != Reduction::match_all) mine.result = total;
  });
}

void shuffle_meeting(const Meeting& meeting) {
  for_lanes<Shuffled>(meeting, [](int, Shuffled& mine) { std::memcpy(mine.old, mine.value, mine.bytes); });
  for_lanes<Shuffled>(meeting, [&](int lane, Shuffled& mine) {
    Machine& machine = Machine::get();
    if (!(meeting.arrived >> mine.source & 1))
      machine.fail(std::string(meeting.name) + " reads lane " + std::to_string(mine.source) +
                   ", which takes no part\n  reader    " + machine.describe(machine.fiber(meeting.warp, lane)) +
                   "\n            at " + describe(meeting.site));
    const auto& source = *static_cast<const Shuffled*>(machine.fiber(meeting.warp, mine.source).given);
    std::memcpy(mine.value, source.old, mine.bytes);
  });
}

}  // namespace

void shuffle(const char* name, unsigned mask, void* value, size_t bytes, int source, Site at) {
  Shuffled mine{value, bytes, source, {}};
  Machine::get().meet(name, mask, &mine, shuffle_meeting, at);
}

uint64_t reduce(const char* name, unsigned mask, uint64_t value, Reduction reduction, Site at) {
  Reduced mine{value, 0, reduction};
  Machine::get().meet(name, mask, &mine, reduce_meeting, at);
  return mine.result;
}

// ---- atomics --------------------------------------------------------------------------------------------------------

uint64_t begin_atomic(const void* address, size_t bytes) {
  const Pc pc = pc_of(__builtin_return_address(0));
  Machine& machine = Machine::get();
  machine.yield();
  machine.memory().require_aligned(address, bytes, "atomic", pc);
  machine.memory().touch(address, bytes, Access::atomic, pc);
  machine.release_and_acquire(address, bytes);
  uint64_t value = 0;
  std::memcpy(&value, address, bytes);
  return value;
}

void end_atomic(void* address, size_t bytes, uint64_t value) { std::memcpy(address, &value, bytes); }

// ---- copies ---------------------------------------------------------------------------------------------------------

void begin_copy(void* shared, const void* global, size_t bytes, bool valid) {
  Machine::get().memory().begin_copy(shared, global, bytes, valid, pc_of(__builtin_return_address(0)));
}
void commit_copies() { Machine::get().memory().commit_copies(); }
void wait_for_copies(int groups_left) { Machine::get().memory().finish_copies(groups_left); }

// ---- matrices -------------------------------------------------------------------------------------------------------

namespace {

// Lane 8m + i gives the address of row i of matrix m. Of each matrix a lane holds, in one register, elements
// 2 * (lane % 4) and the next of row lane / 4; of column lane / 4 if transposed.
struct Matrices {
  uint32_t* words;
  int count;
  unsigned char* row;
  bool transposed, store;
};

void move_matrices(const Meeting& meeting) {
  require_whole_warp(meeting);
  unsigned char* rows[kWarpSize];
  for_lanes<Matrices>(meeting, [&](int lane, Matrices& mine) { rows[lane] = mine.row; });
  for_lanes<Matrices>(meeting, [&](int lane, Matrices& mine) {
    for (int m = 0; m < mine.count; ++m) {
      for (int i = 0; i < 2; ++i) {
        const int across = lane % 4 * 2 + i, down = lane / 4;
        unsigned char* const element =
            rows[8 * m + (mine.transposed ? across : down)] + 2 * (mine.transposed ? down : across);
        auto* const half = reinterpret_cast<unsigned char*>(mine.words + m) + 2 * i;
        std::memcpy(mine.store ? element : half, mine.store ? half : element, 2);
      }
    }
  });
}

void move(const char* name, Matrices mine, Pc pc) {
  Memory& memory = Machine::get().memory();
  if (current->lane < 8 * mine.count) {
    memory.require_aligned(mine.row, 16, name, pc);
    if (!memory.is_shared(mine.row)) Machine::get().fail(std::string(name) + " of " + memory.describe(mine.row));
    memory.touch(mine.row, 16, mine.store ? Access::write : Access::read, pc);
  }
  Machine::get().meet(name, kFullMask, &mine, move_matrices, {});
}

}  // namespace

void ldmatrix(uint32_t* words, int matrices, const void* row, bool transposed) {
  auto* const address = static_cast<unsigned char*>(const_cast<void*>(row));
  move("ldmatrix", {words, matrices, address, transposed, false}, pc_of(__builtin_return_address(0)));
}
void stmatrix(const uint32_t* words, int matrices, void* row, bool transposed) {
  move("stmatrix", {const_cast<uint32_t*>(words), matrices, static_cast<unsigned char*>(row), transposed, true},
       pc_of(__builtin_return_address(0)));
}

// ---- products -------------------------------------------------------------------------------------------------------

namespace {

struct Fragments {
  MmaType type;
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

double element(MmaType type, uint32_t word, int i) {
  switch (type) {
    case MmaType::f16:
      return __half2float({uint16_t(word >> (16 * i))});
    case MmaType::bf16:
      return __bfloat162float({uint16_t(word >> (16 * i))});
    default:
      return __uint_as_float(word & 0xffffe000u);
  }
}

// A register holds one or two neighbours in k; a warp's four lanes of one row hold four registers of it, then the next
// four. Element i of D is at row lane / 4 + 8 * (i / 2), column 2 * (lane % 4) + i % 2.
void multiply(const Meeting& meeting) {
  require_whole_warp(meeting);
  double a[16][16], b[8][16];
  int depth = 0;
  for_lanes<Fragments>(meeting, [&](int lane, Fragments& mine) {
    const int packed = mine.type == MmaType::tf32 ? 1 : 2, row = lane / 4;
    depth = 8 * packed;
    for (int i = 0; i < packed; ++i) {
      for (int part = 0; part < 2; ++part) {
        const int k = (lane % 4 + 4 * part) * packed + i;
        a[row][k] = element(mine.type, mine.a[2 * part], i);
        a[row + 8][k] = element(mine.type, mine.a[2 * part + 1], i);
        b[row][k] = element(mine.type, mine.b[part], i);
      }
    }
  });
  for_lanes<Fragments>(meeting, [&](int lane, Fragments& mine) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = 0;
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[column][k];
      mine.d[i] = float(double(mine.d[i]) + sum);
    }
  });
}

}  // namespace

void mma(MmaType type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments mine{type, d, a, {b0, b1}};
  const char* const name = type == MmaType::f16 ? "mma f16" : type == MmaType::bf16 ? "mma bf16" : "mma tf32";
  Machine::get().meet(name, kFullMask, &mine, multiply, {});
}

}  // namespace simt

// The names of CUDA, outside of the namespace.
void __syncwarp(unsigned mask, simt::Site at) {
  simt::Machine::get().meet(
      "__syncwarp", mask, nullptr,
      [](const simt::Meeting& meeting) { simt::Machine::get().order_warp(meeting.warp, meeting.arrived); }, at);
}
void __threadfence() { simt::Machine::get().fence(); }
