// What the CUDA bindings share: checks, pointers, and how kernels are started on torch's current stream.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "common/encode_tensor_map.h"
#include "common/integers.cuh"
#include "common/tensor.h"

namespace fastok::cuda {

// Starts kernels on the current stream of the device of `like`, which is made the current one for as long as this
// lives. Neither allocates nor waits, so that it can be captured in a graph.
class Launcher {
 public:
  explicit Launcher(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void operator()(dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...), const Arguments&... args) {
    grant(kernel, shared_bytes);
    kernel<<<grid, block, shared_bytes, stream_>>>(args...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  // The same with so many blocks, neighbours in x, to a cluster.
  template <class... Parameters, class... Arguments>
  void clusters(unsigned blocks, dim3 grid, dim3 block, size_t shared_bytes, void (*kernel)(Parameters...),
                const Arguments&... args) {
    grant(kernel, shared_bytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {blocks, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream_;
    config.attrs = &attribute, config.numAttrs = 1;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, Parameters(args)...));
  }
  void zero(void* p, size_t bytes) { STD_CUDA_CHECK(cudaMemsetAsync(p, 0, bytes, stream_)); }
  TensorMap tensor_map(const TiledArray& array) { return encode_tensor_map(array); }

 private:
  template <class Kernel>
  static void grant(Kernel* kernel, size_t shared_bytes) {
    constexpr size_t kGrantedToAll = 48 << 10;
    if (shared_bytes > kGrantedToAll)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Of the tensor's device: 90 is compute capability 9.0.
inline int capability_of(const Tensor& x) {
  int major = 0, minor = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.get_device_index()));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, x.get_device_index()));
  return 10 * major + minor;
}

// The architecture that the code of a kernel was written for which the current device runs: 80 on any newer one too, if
// there is no other code for it.
template <class... Parameters>
int arch_of(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion;
}

// What the tensor's device grants a block, if it is asked to.
inline size_t most_shared_bytes(const Tensor& x) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, x.get_device_index()));
  return size_t(bytes);
}

inline void check_on_device(const Tensor& x, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == like.get_device_index(), name, " must be on the device of ",
                  like_name);
}

inline void check_shape(const Tensor& x, const char* name, std::initializer_list<int64_t> shape) {
  bool same = x.dim() == int64_t(shape.size());
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == shape.begin()[i];
  STD_TORCH_CHECK(same, name, " has the wrong shape");
}

// int32 and int64 as they are; other integers are converted first, into `held`.
inline Integers integers_of(const Tensor& x, const char* name, const Tensor& like, Tensor& held) {
  check_on_device(x, name, like, "the other arguments");
  const ScalarType dtype = x.scalar_type();
  held = dtype == ScalarType::Int || dtype == ScalarType::Long ? x : torch::stable::to(x, ScalarType::Long);
  held = checked_contiguous(held, held.scalar_type(), name);
  return {held.const_data_ptr(), held.scalar_type() == ScalarType::Long};
}

// Kernels count tokens and channels in 32 bits, elements in 64.
inline void check_countable(int64_t count, const char* what) {
  STD_TORCH_CHECK(count < (int64_t(1) << 30), what, " must be less than 2**30, got ", count);
}

// One dimension of a grid.
inline void check_grid(int64_t blocks, const char* what) {
  STD_TORCH_CHECK(blocks < (int64_t(1) << 31), what, " is too large: ", blocks, " blocks");
}

}  // namespace fastok::cuda
