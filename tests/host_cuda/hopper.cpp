// See hopper.h. That a product needs all four warps of a warpgroup is checked when the block ends.
#include "hopper.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace simt {

using fastok::Dtype;
using fastok::cuda::TensorMap;
using fastok::cuda::TiledArray;

namespace {

constexpr uint32_t kSwizzleRow = 128;

// Chunks of 16 bytes change places within a row of 128, by the row's number.
uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

Mbarrier& at(void* barrier, Access access, Pc pc) {
  Machine& machine = Machine::get();
  Memory& memory = machine.memory();
  memory.require_aligned(barrier, 8, "mbarrier", pc);
  if (!memory.is_shared(barrier)) machine.fail("mbarrier outside of shared memory: " + memory.describe(barrier));
  memory.touch(barrier, 8, access, pc);
  Mbarrier& found = machine.mbarrier(barrier);
  if (access == Access::atomic && found.expected == 0)
    machine.fail("use of an mbarrier that was not initialised\n  place     " + memory.describe(barrier) +
                 "\n  thread    " + machine.describe(*current));
  return found;
}

}  // namespace

// ---- barriers -------------------------------------------------------------------------------------------------------

void mbarrier_init(void* barrier, int arrivals) {
  Mbarrier& mine = at(barrier, Access::write, pc_of(__builtin_return_address(0)));
  const int warp = mine.warp;
  mine = {};
  mine.warp = warp;
  mine.expected = mine.pending = arrivals;
}

void mbarrier_arrive(void* barrier, int bytes) {
  Machine& machine = Machine::get();
  Mbarrier& mine = at(barrier, Access::atomic, pc_of(__builtin_return_address(0)));
  if (mine.pending == 0)
    machine.fail("more arrivals than the phase of an mbarrier has\n  place     " + machine.memory().describe(barrier) +
                 "\n  thread    " + machine.describe(*current));
  mine.bytes += bytes;
  --mine.pending;
  machine.arrive(mine);
}

void mbarrier_wait(void* barrier, int parity) {
  Machine& machine = Machine::get();
  machine.yield();
  Mbarrier& mine = at(barrier, Access::atomic, pc_of(__builtin_return_address(0)));
  machine.wait(mine, parity);
}

// ---- copies ---------------------------------------------------------------------------------------------------------

static_assert(sizeof(TiledArray) <= sizeof(TensorMap));

TensorMap encode_tensor_map(const TiledArray& array) {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw Failure(std::string("tensor map: ") + what);
  };
  require(reinterpret_cast<uintptr_t>(array.data) % 16 == 0, "data must be aligned to 16 bytes");
  require(array.dtype == Dtype::f16 || array.dtype == Dtype::bf16, "elements must have 16 bits");
  require(array.tile[0] * 2 == kSwizzleRow, "rows of a tile must have 128 bytes");
  for (int i = 0; i < 4; ++i) {
    require(array.sizes[i] >= 1 && array.sizes[i] <= uint64_t(1) << 32, "sizes must be from 1 to 2**32");
    require(array.tile[i] >= 1 && array.tile[i] <= 256, "tiles must be from 1 to 256");
  }
  for (const uint64_t stride : array.strides)
    require(stride > 0 && stride % 16 == 0 && stride < uint64_t(1) << 40,
            "strides must be multiples of 16 below 2**40");
  TensorMap map{};
  std::memcpy(map.bytes, &array, sizeof(array));
  return map;
}

void copy_tile(void* tile, const unsigned char* map, void* barrier, const int (&start)[4]) {
  const Pc pc = pc_of(__builtin_return_address(0));
  Machine& machine = Machine::get();
  Memory& memory = machine.memory();
  TiledArray array;
  std::memcpy(&array, map, sizeof(array));
  auto* const to = static_cast<unsigned char*>(tile);
  if (!memory.is_shared(to) || shared_offset(to) % (8 * kSwizzleRow) != 0)
    machine.fail("a tile must begin at a multiple of 1024 bytes of shared memory: " + memory.describe(to));
  Mbarrier& mine = at(barrier, Access::atomic, pc);

  const auto inside = [&](int axis, uint32_t i) {
    const int64_t x = int64_t(start[axis]) + i;
    return x >= 0 && x < int64_t(array.sizes[axis]);
  };
  const uint32_t base = shared_offset(to);
  uint32_t row = 0;
  machine.begin_copy(mine);
  for (uint32_t i3 = 0; i3 < array.tile[3]; ++i3) {
    for (uint32_t i2 = 0; i2 < array.tile[2]; ++i2) {
      for (uint32_t i1 = 0; i1 < array.tile[1]; ++i1, ++row) {
        unsigned char bytes[kSwizzleRow] = {};
        if (inside(1, i1) && inside(2, i2) && inside(3, i3)) {
          const auto* const from = static_cast<const unsigned char*>(array.data) +
                                   (start[1] + int64_t(i1)) * int64_t(array.strides[0]) +
                                   (start[2] + int64_t(i2)) * int64_t(array.strides[1]) +
                                   (start[3] + int64_t(i3)) * int64_t(array.strides[2]);
          for (uint32_t i0 = 0; i0 < array.tile[0]; i0 += 8) {
            if (!inside(0, i0)) continue;
            const auto whole = size_t(std::min<int64_t>(8, int64_t(array.sizes[0]) - start[0] - i0));
            memory.touch(from + (start[0] + i0) * 2, whole * 2, Access::read, pc);
            std::memcpy(bytes + i0 * 2, from + (start[0] + i0) * 2, whole * 2);
          }
        }
        memory.touch(to + row * kSwizzleRow, kSwizzleRow, Access::write, pc);
        for (uint32_t chunk = 0; chunk < kSwizzleRow; chunk += 16)
          std::memcpy(to - base + swizzled(base + row * kSwizzleRow + chunk), bytes + chunk, 16);
      }
    }
  }
  machine.end_copy(mine, int64_t(row) * kSwizzleRow);
}

// ---- products -------------------------------------------------------------------------------------------------------

uint32_t shared_offset(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - Machine::get().memory().shared());
}

void multiply_async(bool f16, float* d, int columns, const uint32_t* a, uint64_t a_rows, uint64_t b, bool add) {
  current->products.push_back({f16, add, d, columns, a, a_rows, b, -1, pc_of(__builtin_return_address(0))});
  ++Machine::get().warp(current->warp).products;
}

void commit_products() {
  for (AsyncProduct& product : current->products)
    if (product.group < 0) product.group = current->product_groups;
  ++current->product_groups;
}

namespace {

// A matrix descriptor: 16 elements deep, rows or columns of 128-byte rows.
struct Operand {
  uint32_t start, leading, stride;

  explicit Operand(uint64_t descriptor)
      : start(uint32_t(descriptor & 0x3fff) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride(uint32_t(descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0)
      Machine::get().fail("wgmma: only 128-byte swizzling of aligned tiles is served");
  }
  // Offsets of eight elements each in shared memory: of row r from the depth `deep` on, and of row `deep`, from column
  // c.
  uint32_t of_row(uint32_t r, uint32_t deep) const {
    return swizzled(start + r / 8 * stride + r % 8 * kSwizzleRow + deep * 2);
  }
  uint32_t of_column(uint32_t c, uint32_t deep) const {
    return swizzled(start + c / 64 * leading + deep / 8 * stride + deep % 8 * kSwizzleRow + c % 64 * 2);
  }
};

double element(bool f16, uint16_t bits) {
  return f16 ? double(__half2float({bits})) : double(__bfloat162float({bits}));
}

// The warp's 16 rows: those of its place among the four of its warpgroup.
void multiply(const Meeting& meeting) {
  if (meeting.arrived != kFullMask) Machine::get().fail("wgmma needs all lanes of the warp, and some have exited");
  Machine& machine = Machine::get();
  const unsigned char* const shared = machine.memory().shared();
  const auto given = [&](int lane) -> AsyncProduct& {
    return *static_cast<AsyncProduct*>(machine.fiber(meeting.warp, lane).given);
  };
  const AsyncProduct& one = given(0);
  const auto load = [&](uint32_t offset, int i) {
    uint16_t bits;
    std::memcpy(&bits, shared + offset + 2 * i, 2);
    return element(one.f16, bits);
  };
  double a[16][16];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const AsyncProduct& mine = given(lane);
    if (mine.columns != one.columns || mine.a_rows != one.a_rows || mine.b != one.b || mine.add != one.add)
      machine.fail("lanes disagree about a wgmma");
    if (!mine.a) continue;
    for (int i = 0; i < 8; ++i)
      a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
          element(one.f16, uint16_t(mine.a[i / 2] >> (i % 2 * 16)));
  }
  if (!one.a) {
    const Operand rows(one.a_rows);
    for (uint32_t r = 0; r < 16; ++r)
      for (uint32_t k = 0; k < 16; ++k)
        a[r][k] = load(rows.of_row(uint32_t(meeting.warp % 4) * 16 + r, k / 8 * 8), int(k % 8));
  }
  const Operand operand(one.b);
  std::vector<double> b(size_t(one.columns) * 16);
  for (uint32_t c = 0; c < uint32_t(one.columns); ++c)
    for (uint32_t k = 0; k < 16; ++k)
      b[c * 16 + k] =
          one.a ? load(operand.of_column(c / 8 * 8, k), int(c % 8)) : load(operand.of_row(c, k / 8 * 8), int(k % 8));
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const AsyncProduct& mine = given(lane);
    for (int i = 0; i < one.columns / 2; ++i) {
      const double* const row = a[lane / 4 + i % 4 / 2 * 8];
      const double* const column = b.data() + (i / 4 * 8 + lane % 4 * 2 + i % 2) * 16;
      double sum = mine.add ? double(mine.d[i]) : 0.0;
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      mine.d[i] = float(sum);
    }
  }
}

// Each lane's share of what the warp reads, 16 bytes at a time.
void touch_operands(const AsyncProduct& product) {
  Memory& memory = Machine::get().memory();
  const auto lane = uint32_t(current->lane);
  const auto read = [&](uint32_t offset) { memory.touch(memory.shared() + offset, 16, Access::read, product.pc); };
  if (!product.a) read(Operand(product.a_rows).of_row(uint32_t(current->warp % 4) * 16 + lane % 16, lane / 16 * 8));
  const Operand b(product.b);
  for (uint32_t i = lane; i < uint32_t(product.columns) * 2; i += kWarpSize)
    read(product.a ? b.of_column(i / 16 * 8, i % 16) : b.of_row(i / 2, i % 2 * 8));
}

}  // namespace

void wait_for_products(int groups_left) {
  std::vector<AsyncProduct> due;
  auto& all = current->products;
  const auto left = std::find_if(all.begin(), all.end(), [&](const AsyncProduct& product) {
    return product.group < 0 || product.group >= current->product_groups - groups_left;
  });
  due.assign(all.begin(), left);
  all.erase(all.begin(), left);
  for (AsyncProduct& product : due) {
    touch_operands(product);
    Machine::get().meet("wgmma", kFullMask, &product, multiply, {});
  }
}

}  // namespace simt
