// Holds what csrc takes Hopper's instructions to do against CuTe's layouts, on the host: how tiles lie in shared
// memory, what descriptors say of them, and which thread has which element. Prints what differs.
#include <cutlass/numeric_types.h>
#include <cstdio>
#include <cute/tensor.hpp>

#include "attention/sm90_tile.cuh"

using namespace cute;
using fastok::ptx::matrix_descriptor;
namespace GMMA = SM90::GMMA;

namespace {

int differences = 0;
template <class... Args>
void check(bool same, const char* format, Args... args) {
  if (same || ++differences > 20) return;
  std::printf(format, args...);
  std::printf("\n");
}

constexpr int kRow = fastok::ptx::kSwizzleRow, kChunk = fastok::cuda::sm90::kChunk;

// Where a tile of 64-element chunks has element x of row r: as send_tokens() and the copies' swizzling put it.
int place(int rows, int r, int x) {
  const int offset = x / kChunk * rows * kRow + r * kRow + x % kChunk * 2;
  return (offset ^ (offset >> 7 & 7) << 4) / 2;
}

// A tile of `rows` tokens, `width` elements each, as an operand whose rows or (kColumns) columns are the tokens'
// numbers.
template <int kRows, int kWidth>
void check_tile() {
  const auto rows = tile_to_shape(GMMA::Layout_K_SW128_Atom<half_t>{}, Shape<Int<kRows>, Int<kWidth>>{});
  const auto columns =
      tile_to_shape(GMMA::Layout_MN_SW128_Atom<half_t>{}, Shape<Int<kWidth>, Int<kRows>>{}, Step<_2, _1>{});
  const auto rows_at = as_position_independent_swizzle_layout(rows);
  const auto columns_at = as_position_independent_swizzle_layout(columns);
  for (int r = 0; r < kRows; ++r) {
    for (int x = 0; x < kWidth; ++x) {
      check(int(rows_at(r, x)) == place(kRows, r, x), "rows %dx%d at (%d, %d)", kRows, kWidth, r, x);
      check(int(columns_at(x, r)) == place(kRows, r, x), "columns %dx%d at (%d, %d)", kRows, kWidth, x, r);
    }
  }
  // The descriptors of one instruction; CuTe takes addresses on the host for 0.
  const auto one_rows = make_tensor(make_smem_ptr(static_cast<half_t*>(nullptr)), rows);
  const auto one_columns = make_tensor(make_smem_ptr(static_cast<half_t*>(nullptr)), columns);
  const uint64_t of_rows =
      GMMA::make_gmma_desc<GMMA::Major::K>(local_tile(one_rows, Shape<Int<kRows>, _16>{}, Coord<_0, _0>{}));
  check(of_rows == matrix_descriptor(0, 16, fastok::ptx::kSwizzleBlock), "descriptor of rows %llx", (long long)of_rows);
  const uint64_t of_columns =
      GMMA::make_gmma_desc<GMMA::Major::MN>(local_tile(one_columns, Shape<Int<kWidth>, _16>{}, Coord<_0, _0>{}));
  // With 64 columns there is no next chunk, and its distance means nothing.
  const uint64_t mask = kWidth == 64 ? ~(uint64_t(0x3fff) << 16) : ~uint64_t(0);
  check((of_columns & mask) == (matrix_descriptor(0, kRows * kRow, fastok::ptx::kSwizzleBlock) & mask),
        "descriptor of columns %llx", (long long)of_columns);
}

template <class Atom, int kColumns>
void check_results() {
  const auto layout = typename MMA_Traits<Atom>::CLayout{};
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < kColumns / 2; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      check(int(layout(t, i)) == row + 64 * column, "result %d of thread %d, %d columns", i, t, kColumns);
    }
  }
}

template <class Atom>
void check_factors() {
  const auto layout = typename MMA_Traits<Atom>::ALayout{};
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < 8; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, column = t % 4 * 2 + i % 2 + i / 4 * 8;
      check(int(layout(t, i)) == row + 64 * column, "factor %d of thread %d", i, t);
    }
  }
}

}  // namespace

int main() {
  check_tile<64, 64>();
  check_tile<64, 128>();
  check_tile<128, 64>();
  check_tile<128, 128>();
  check_results<GMMA::MMA_64x128x16_F32F16F16_SS<GMMA::Major::K, GMMA::Major::K>, 128>();
  check_results<GMMA::MMA_64x64x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::MN>, 64>();
  check_results<GMMA::MMA_64x128x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::MN>, 128>();
  check_factors<GMMA::MMA_64x64x16_F32F16F16_RS<GMMA::Major::K, GMMA::Major::MN>>();
  check_factors<GMMA::MMA_64x128x16_F32BF16BF16_RS<GMMA::Major::K, GMMA::Major::MN>>();
  std::printf("%d differences\n", differences);
  return differences != 0;
}
