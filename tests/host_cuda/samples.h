// What the sample kernels (planted.cuh, features.cuh, hopper_samples.cuh, cluster_samples.cuh) are given: one input,
// one output.
#pragma once
#include "common/device.cuh"
#include "common/tensor_map.h"

namespace simt {

struct Sample {
  int n;
  const void* in;
  void* out;
  fastok::cuda::TensorMap map;  // of an input of 16-bit elements in two dimensions

  template <class T = int>
  __device__ const T* from() const {
    return static_cast<const T*>(in);
  }
  template <class T = int>
  __device__ T* to() const {
    return static_cast<T*>(out);
  }
};

}  // namespace simt
