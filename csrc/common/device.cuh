// What device code includes instead of the CUDA headers, so that g++ can compile it for the host (FASTOK_HOST), and
// the few helpers that every kernel shares. Torch-free.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/dtype.h"

#if defined(FASTOK_HOST)
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// The block's dynamic shared memory.
#define FASTOK_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// The same where tiles begin at multiples of what their swizzling repeats after.
#define FASTOK_SHARED_TILES(name) extern __shared__ __align__(1024) unsigned char name[]
// An array of static shared memory.
#define FASTOK_STATIC_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

namespace fastok::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;

// ---- element types --------------------------------------------------------------------------------------------------

// The type that sums are kept in.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, bf16& out) { out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ void narrow(float x, f16& out) { out.bits = __half_as_ushort(__float2half_rn(x)); }

// kCount elements moved by one instruction.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// ---- shared memory --------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, divided into named arrays in the order of the calls; shared_bytes() in
// common/plan.h tells what each takes, if what lies before it ends at its alignment. Another object divides the whole
// anew, once nobody uses the old arrays.
class SharedMemory {
 public:
#if defined(FASTOK_HOST)
  // The host machine knows where every array ends.
  explicit SharedMemory(unsigned char*) { simt::start_sharing(); }
  template <class T>
  T* take(int count, const char* name, int alignment = 16) {
    return reinterpret_cast<T*>(simt::share(size_t(count) * sizeof(T), name, size_t(alignment)));
  }
#else
  __device__ __forceinline__ explicit SharedMemory(unsigned char* memory) : next_(memory) {}
  template <class T>
  __device__ __forceinline__ T* take(int count, const char*, int alignment = 16) {
    if (alignment > 16)
      next_ += (alignment - static_cast<int>(__cvta_generic_to_shared(next_)) % alignment) % alignment;
    T* const array = reinterpret_cast<T*>(next_);
    next_ += (count * int(sizeof(T)) + 15) & ~15;
    return array;
  }

 private:
  unsigned char* next_;
#endif
};

// ---- warps and blocks -----------------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) / kWarpSize; }
__device__ __forceinline__ int warps_in_block() { return int(blockDim.x) / kWarpSize; }

// Exclusive prefix sum over the block in thread order; `total` gets the sum. `scratch` is one number per warp. All
// threads of the block must call it.
template <class V>
__device__ inline V block_exclusive_sum(std::type_identity_t<V> value, V* scratch, std::type_identity_t<V>& total) {
  V inclusive = value;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const V below = __shfl_up_sync(kFullWarp, inclusive, step);
    if (lane_index() >= step) inclusive += below;
  }
  __syncthreads();  // the previous call's readers are done with scratch
  if (lane_index() == kWarpSize - 1) scratch[warp_index()] = inclusive;
  __syncthreads();

  // Every thread adds up the warps before its own: at most 32 broadcast reads, and no third barrier.
  V before = 0;
  total = 0;
  for (int warp = 0; warp < warps_in_block(); ++warp) {
    if (warp == warp_index()) before = total;
    total += scratch[warp];
  }
  return before + inclusive - value;
}

}  // namespace fastok::cuda
