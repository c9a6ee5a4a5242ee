// Host bodies of csrc/ptx for what Hopper added: barriers with phases, tiles copied by the hardware, and products of a
// warpgroup that run beside its other work.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/tensor_map.h"

namespace simt {

void mbarrier_init(void* barrier, int arrivals);
// Announces so many bytes of copies, then arrives.
void mbarrier_arrive(void* barrier, int bytes);
void mbarrier_wait(void* barrier, int parity);

// The driver's cuTensorMapEncodeTiled: complains of what that refuses.
fastok::cuda::TensorMap encode_tensor_map(const fastok::cuda::TiledArray& array);
// `map`: the bytes of a tensor map. The copy is done at once, but comes before those only who wait for the barrier: not
// before what the calling thread does next.
void copy_tile(void* tile, const unsigned char* map, void* barrier, const int (&at)[4]);

// Where in the block's shared memory `p` lies.
uint32_t shared_offset(const void* p);

// Products that a warp's lanes start are computed when these wait for them, and not before: what reads the results
// earlier, or has overwritten an operand by then, goes wrong.
// d[kColumns / 2] (+)= A B; A from the descriptor, or from registers if `a` is given, B then by columns.
void multiply_async(bool f16, float* d, int columns, const uint32_t* a, uint64_t a_rows, uint64_t b, bool add);
void commit_products();
void wait_for_products(int groups_left);

}  // namespace simt
