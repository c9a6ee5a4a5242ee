// What the sample kernels of planted.cuh and features.cuh are given: one input, one output.
#pragma once
#include "common/device.cuh"

namespace simt {

struct Sample {
  int n;
  const void* in;
  void* out;

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
