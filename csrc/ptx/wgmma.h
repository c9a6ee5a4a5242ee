// wgmma: D += A * B by a warpgroup (four warps, the first one's index a multiple of four), running beside its other
// work. D is 64 x n in fp32 registers: element i of thread t is at row t / 32 * 16 + t % 32 / 4 + i % 4 / 2 * 8, column
// i / 4 * 8 + t % 4 * 2 + i % 2. The instructions are CuTe's (cute/arch/mma_sm90_gmma.hpp).
//
// Operands in shared memory consist of rows of 128 bytes, swizzled: the 16-byte chunk c of row r of a tile, which
// begins at a multiple of 1024 bytes, lies where chunk c ^ r % 8 would.
#pragma once
#include <type_traits>
#include <utility>

#include "common/device.cuh"
#include "ptx/mbarrier.h"
#if !defined(FASTOK_HOST)
#include <cute/arch/mma_sm90_gmma.hpp>
#endif

namespace fastok::ptx {

constexpr int kSwizzleRow = 128, kSwizzleBlock = 8 * kSwizzleRow;  // bytes

// As the instruction has them: address, leading and stride offset in 16 bytes, 128-byte swizzle.
__host__ __device__ constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 |
         uint64_t(1) << 62;
}
__device__ __forceinline__ uint32_t tile_address(const unsigned char* tile) {
#if defined(FASTOK_HOST)
  return simt::shared_offset(tile);
#else
  return shared_address(tile);
#endif
}
// An operand whose rows lie one behind the other: 16 elements of each from here on.
__device__ __forceinline__ uint64_t rows_descriptor(const unsigned char* tile) {
  return matrix_descriptor(tile_address(tile), 16, kSwizzleBlock);
}
// An operand whose columns are what lies in the rows: 16 rows from here on, 64 columns each; the next 64 columns follow
// `next` bytes behind.
__device__ __forceinline__ uint64_t columns_descriptor(const unsigned char* tile, int next) {
  return matrix_descriptor(tile_address(tile), uint32_t(next), kSwizzleBlock);
}

// Before the first product, and whenever registers that products use were written by something else.
__device__ __forceinline__ void wgmma_fence() {
#if !defined(FASTOK_HOST)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
// No use of these registers is moved from one side of this to the other: the compiler does not know that products write
// and read them until they have been waited for.
template <class T, int kCount>
__device__ __forceinline__ void keep_in_place([[maybe_unused]] T (&registers)[kCount][4]) {
#if !defined(FASTOK_HOST)
#pragma unroll
  for (int i = 0; i < 4 * kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(registers[i / 4][i % 4])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i / 4][i % 4])::"memory");
    }
  }
#endif
}

// Products since the last group are a group.
__device__ __forceinline__ void wgmma_commit_group() {
#if defined(FASTOK_HOST)
  simt::commit_products();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all but the last kGroups groups are finished.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait_group() {
#if defined(FASTOK_HOST)
  simt::wait_for_products(kGroups);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

#if !defined(FASTOK_HOST)
namespace detail {

template <class T, int kColumns, bool kFromRegisters>
struct Product;
#define FASTOK_PRODUCT(n)                                                                                            \
  template <>                                                                                                        \
  struct Product<f16, n, false>                                                                                      \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K> {};   \
  template <>                                                                                                        \
  struct Product<bf16, n, false>                                                                                     \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K> {}; \
  template <>                                                                                                        \
  struct Product<f16, n, true>                                                                                       \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN> {};  \
  template <>                                                                                                        \
  struct Product<bf16, n, true>                                                                                      \
      : cute::SM90::GMMA::MMA_64x##n##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::MN> {};
FASTOK_PRODUCT(64)
FASTOK_PRODUCT(128)
#undef FASTOK_PRODUCT

template <class Op, int kColumns, int... i, class... Operands>
__device__ __forceinline__ void multiply(std::integer_sequence<int, i...>, float (&d)[kColumns / 8][4], bool add,
                                         Operands... operands) {
  Op::fma(operands..., d[i / 4][i % 4]..., add ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
}

}  // namespace detail
#endif

// d (+)= rows of `a` times rows of `b`, 16 elements deep: 64 and kColumns rows.
template <class T, int kColumns>
__device__ __forceinline__ void wgmma_rows(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b, bool add) {
#if defined(FASTOK_HOST)
  simt::multiply_async(std::is_same_v<T, f16>, &d[0][0], kColumns, nullptr, a, b, add);
#else
  using Op = detail::Product<T, kColumns, false>;
  detail::multiply<Op, kColumns>(std::make_integer_sequence<int, kColumns / 2>{}, d, add, a, b);
#endif
}

// d += A in registers (mma.sync's layout, each warp its own 16 rows) times columns of `b`.
template <class T, int kColumns>
__device__ __forceinline__ void wgmma_columns(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b) {
#if defined(FASTOK_HOST)
  simt::multiply_async(std::is_same_v<T, f16>, &d[0][0], kColumns, a, 0, b, true);
#else
  using Op = detail::Product<T, kColumns, true>;
  detail::multiply<Op, kColumns>(std::make_integer_sequence<int, kColumns / 2>{}, d, true, a[0], a[1], a[2], a[3], b);
#endif
}

}  // namespace fastok::ptx
