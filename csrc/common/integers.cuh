// Integers of the user's, int32 or int64, as kernels read them: a conversion would take a launch. Torch-free.
#pragma once
#include "common/device.cuh"

namespace fastok::cuda {

struct Integers {
  const void* data;  // nullptr: none
  bool wide;         // int64

  __device__ int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
  // Number i, if there are any, else `most`; within [0, most].
  __device__ int length(int64_t i, int most) const {
    if (!data) return most;
    const int64_t own = at(i);
    return own < 0 ? 0 : own < most ? int(own) : most;
  }
};

}  // namespace fastok::cuda
