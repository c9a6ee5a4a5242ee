// CUDA C++ as g++ sees it. csrc/common/device.cuh includes this in place of the CUDA headers when FASTOK_HOST is
// defined: keywords, indices, shared memory and launches here, the built-in functions in intrinsics.h.
//
// Files that include this are compiled with -fsanitize=thread, so that every load and store calls a hook (hooks.cpp),
// and everything declared in here is defined in files that are not. The machine itself is in machine.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)
#define FASTOK_SHARED(name) unsigned char* const name = simt::shared_memory()
#define FASTOK_SHARED_TILES(name) FASTOK_SHARED(name)
#define FASTOK_STATIC_SHARED(type, name, count) \
  type* const name = reinterpret_cast<type*>(simt::share_static(sizeof(type) * (count), #name, __PRETTY_FUNCTION__))

#if defined(__SANITIZE_THREAD__)
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("simt_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("simt_memmove");
void* memset(void*, int, size_t) noexcept __asm__("simt_memset");
}
#endif

#include "cluster.h"
#include "hopper.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

// Constant in a thread, hence for all that the compiler sees of one.
__attribute__((const)) dim3 thread_index();
__attribute__((const)) dim3 block_index();
__attribute__((const)) dim3 block_dim();
__attribute__((const)) dim3 grid_dim();

// The block's dynamic shared memory, and what SharedMemory of csrc/common/device.cuh is made of: dividing it anew, and
// taking the next array of it. Behind each array lies a red zone.
unsigned char* shared_memory();
void start_sharing();
unsigned char* share(size_t bytes, const char* name, size_t alignment);
// A static array: one in the block for each function (and its template arguments) and name, however the dynamic memory
// is divided.
unsigned char* share_static(size_t bytes, const char* name, const char* function);

// A place in the source, as the default value of a parameter: where the function was called.
struct Site {
  const char* file = nullptr;
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Launch {
  dim3 grid, block;
  unsigned cluster;  // blocks, along x
  size_t shared_bytes, granted_bytes;
  uint64_t seed;
  const void* kernel;
  void (*run)(const void* body);  // one thread
  const void* body;
};
void launch(const Launch& launch);
void zero(void* p, size_t bytes);

// What kernels are started with on the host; csrc/common/launch.h has the one for the device.
struct Launcher {
  uint64_t seed;
  size_t granted_bytes = 99 << 10;  // of shared memory, by every device that there are kernels for

  template <class... Parameters, class... Arguments>
  void operator()(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...), const Arguments&... args) {
    clusters(1, grid, block, shared_bytes, kernel, args...);
  }
  // The same with so many blocks, neighbours in x, to a cluster.
  template <class... Parameters, class... Arguments>
  void clusters(unsigned blocks, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...),
                const Arguments&... args) {
    // The arguments are read from the launcher's stack, which is no business of the detectors.
    const auto body = [&]() __attribute__((no_sanitize("thread"))) { kernel(args...); };
    const auto run = [](const void* it) { (*static_cast<decltype(body)*>(it))(); };
    launch(
        {grid, block, blocks, shared_bytes, granted_bytes, seed++, reinterpret_cast<const void*>(kernel), run, &body});
  }
  void zero(void* p, size_t bytes) { simt::zero(p, bytes); }
  fastok::cuda::TensorMap tensor_map(const fastok::cuda::TiledArray& array) { return encode_tensor_map(array); }
};

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_dim())
#define gridDim (simt::grid_dim())

#include "intrinsics.h"
#include "tensor_core.h"
