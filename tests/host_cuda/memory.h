// What kernels may touch, and the detectors that watch every load and store: bounds, alignment, initialisation, races.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "order.h"

namespace simt {

struct Fiber;
class Machine;

// A place in the machine code, from the beginning of this module.
using Pc = uint32_t;
Pc pc_of(const void* return_address);

enum class Access : uint8_t { read, write, atomic };

// Who touched a word of four bytes, and when: the lanes of one warp that did the same with the same clock.
struct Stamp {
  Clock clock;
  uint32_t lanes;
  Pc pc;
  uint16_t warp;
  uint8_t bytes;  // which of the four
  Access access;
};
// Four stamps hold what matters of a word's past: what came before all later accesses makes room.
struct alignas(64) Cell {
  Stamp stamps[4];
};
constexpr size_t kWordBytes = 4;

// Working memory is written before it is read, as an output is, but need not be written entirely.
enum class Role { input, output, working };

// An array in global memory, as the kernels' caller described it. Strides are in elements.
struct Array {
  std::string name;
  unsigned char* data;
  std::vector<int64_t> shape, strides;
  size_t element;
  Role role;

  Array(std::string name, unsigned char* data, std::vector<int64_t> shape, std::vector<int64_t> strides, size_t element,
        Role role);
  bool empty() const { return extent == 0; }
  // Whether bytes [offset, offset + size) are the array's, and not between its elements.
  bool owns(size_t offset, size_t size) const;
  std::string element_at(size_t offset) const;

  // Dimensions that are more than one step, largest step first; steps in bytes.
  struct Dimension {
    size_t axis, step, count;
  };
  std::vector<Dimension> dimensions;
  size_t extent = 0;  // from the first byte to behind the last
  size_t run = 0;     // bytes that lie together

  // Of outputs.
  std::vector<uint8_t> written;
  std::unique_ptr<Cell[], void (*)(void*)> cells{nullptr, nullptr};
  void watch();
};

// How a thread has divided the block's shared memory. Offsets leave room for the red zones.
struct SharedArray {
  const char* name;
  size_t begin, bytes;
};
struct StaticArray : SharedArray {
  const char* function;
};
struct SharedLayout {
  uint8_t phase = 1;  // divisions so far
  size_t used = 0;    // of what was asked for, without red zones
  std::vector<SharedArray> arrays;
};

// The shared memory of a block.
struct Arena {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char[], Free> memory;
  std::unique_ptr<Cell[], Free> cells;
  std::vector<uint8_t> state;  // of each byte: the phase it was written in, or one of the two below
  size_t bytes = 0, room = 0;
  // Static arrays, as far as the block has come to them: behind the dynamic ones.
  std::vector<StaticArray> static_arrays;
  size_t static_begin = 0;
  // The last access by another block of the cluster: who, and how many phases of the cluster's barrier must end until
  // it has come to an end.
  struct Visit {
    int phases_needed = 0, fiber = 0;
    Pc pc = 0;
  } last_visit;

  static constexpr uint8_t kInFlight = 0xff, kStaticPhase = 0xfe;

  void begin_block(size_t granted);
  bool holds(const void* p) const { return size_t(static_cast<const unsigned char*>(p) - memory.get()) < bytes; }
  size_t offset(const void* p) const { return size_t(static_cast<const unsigned char*>(p) - memory.get()); }
  bool is_static(size_t at) const { return at >= static_begin; }
  const SharedArray* array_at(const SharedLayout& layout, size_t offset, size_t size) const;
};

struct AsyncCopy {
  unsigned char* to;
  size_t size;
  unsigned char bytes[16];
  int group;  // -1: not committed yet
  Pc pc;
};

class Memory {
 public:
  bool report_races = true;

  // ---- the caller's side
  void begin_call(bool rewind);  // rewind: clocks start anew
  void add(Array array);
  void end_call();  // every output must have been written
  void begin_launch() { released_in_launch_.clear(); }
  void begin_cluster(int blocks, size_t shared_bytes);
  void zero(void* p, size_t bytes);

  // ---- the kernel's side
  unsigned char* shared() { return own().memory.get(); }
  void start_sharing();
  unsigned char* share(size_t bytes, const char* name, size_t alignment);
  unsigned char* share_static(size_t bytes, const char* name, const char* function);

  void touch(const void* p, size_t size, Access access, Pc pc);
  void require_aligned(const void* p, size_t alignment, const char* what, Pc pc);
  bool is_shared(const void* p) const { return own().holds(p); }  // of the current fiber's block
  // Of block `rank` of the cluster, what lies there; at its exit, that nobody may be in it.
  unsigned char* visit(int rank, size_t offset, size_t size, Access access, Pc pc);
  void require_left(int rank);

  // cp.async: nothing is seen of a copy until the thread that began it has waited.
  void begin_copy(void* to, const void* from, size_t size, bool valid, Pc pc);
  void commit_copies();
  void finish_copies(int groups_left);

  // What atomics on this word have released: in the block if it is shared, else in the launch.
  Known& released(const void* word) { return (is_shared(word) ? released_in_block_ : released_in_launch_)[word]; }
  std::string describe(const void* p);

 private:
  Arena& own() { return arenas_[size_t(own_rank())]; }
  const Arena& own() const { return arenas_[size_t(own_rank())]; }
  static int own_rank();
  // Divided as the current fiber has, or, if it is another block's, as that block's first thread.
  const SharedLayout& layout_of(const Arena& arena) const;
  void touch_shared(Arena& arena, size_t offset, size_t size, Access access, Pc pc);
  void touch_array(Array& array, size_t offset, size_t size, Access access, Pc pc);
  void stamp(Cell* cells, bool shared, const void* p, size_t offset, size_t size, Access access, Pc pc);
  void stamp_word(Cell& cell, bool shared, const void* p, uint8_t bytes, Access access, Pc pc);
  [[noreturn]] void fail(const std::string& problem, const void* p, size_t size, Access access, Pc pc,
                         const std::string& more = "");
  [[noreturn]] void fail_race(const Stamp& other, int lane, bool shared, bool of_block, const void* p, Access access,
                              Pc pc);
  [[noreturn]] void fail_outside(const void* p, size_t size, Access access, Pc pc);

  std::vector<Array> arrays_;
  size_t last_array_ = 0;
  std::map<const void*, Known> released_in_launch_, released_in_block_;

  std::vector<Arena> arenas_ = std::vector<Arena>(1);  // of the blocks of the cluster
  size_t granted_ = 0;
};

}  // namespace simt
