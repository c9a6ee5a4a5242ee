// ldmatrix: four 8x8 matrices of 16-bit elements (or 8x4 of 32 bits) from shared memory to a warp's registers.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

// Lane 8m + i gives the 16-byte aligned address of row i of matrix m; out[m] is the lane's word of matrix m: row
// lane / 4, bytes 4 * (lane % 4) onwards. All 32 lanes take part.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
#if defined(FASTOK_HOST)
  simt::ldmatrix(out, 4, row, false);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}

// The same with each matrix transposed on its way: the lane's word of matrix m is column lane / 4, rows 2 * (lane % 4)
// and the next.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void* row) {
#if defined(FASTOK_HOST)
  simt::ldmatrix(out, 4, row, true);
#else
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
#endif
}

}  // namespace fastok::ptx
