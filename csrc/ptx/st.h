// st: vector stores that the compiler may not take apart.
#pragma once
#include "common/device.cuh"

namespace fastok::ptx {

// Stores 16 bytes to a 16-byte aligned address at once. Before sm_100 the compiler splits a plain store of a vector
// that is either loaded or zero into one store per element.
__device__ __forceinline__ void st_global_16(void* global, const uint32_t (&words)[4]) {
#if defined(FASTOK_HOST)
  *static_cast<cuda::Pack<uint32_t, 4>*>(global) = {{words[0], words[1], words[2], words[3]}};
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#endif
}

}  // namespace fastok::ptx
