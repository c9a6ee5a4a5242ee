// Host bodies of csrc/ptx: copies that run beside the computation, and the tensor cores.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

// cp.async of `bytes` (4, 8 or 16); zeros if not `valid`.
void begin_copy(void* shared, const void* global, size_t bytes, bool valid);
void commit_copies();
void wait_for_copies(int groups_left);

// 1, 2 or 4 8x8 matrices of 16-bit elements, between shared memory and the registers of a warp.
void ldmatrix(uint32_t* words, int matrices, const void* row, bool transposed);
void stmatrix(const uint32_t* words, int matrices, void* row, bool transposed);

// D += A * B, with A 16 x k row-major, B k x 8 column-major: each product and the sum in fp64, rounded once to fp32.
enum class MmaType { f16, bf16, tf32 };
void mma(MmaType type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace simt
