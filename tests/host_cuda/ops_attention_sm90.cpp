// The Hopper kernels of attention, as csrc/attention/attention_sm90.cu.in makes them for the device.
#include "attention/attention_sm90_kernel.cuh"
#include "attention/scores_sm90_kernel.cuh"

namespace fastok::cuda::sm90 {

#define FASTOK_INSTANCES(T, kWidth)                 \
  template <>                                       \
  ForwardKernel forward_kernel_of<T, kWidth>() {    \
    return attention_sm90_kernel<T, kWidth>;        \
  }                                                 \
  template <>                                       \
  ScoreSumKernel score_sum_kernel_of<T, kWidth>() { \
    return scores_sm90_kernel<T, kWidth>;           \
  }
FASTOK_INSTANCES(f16, 64)
FASTOK_INSTANCES(f16, 128)
FASTOK_INSTANCES(bf16, 64)
FASTOK_INSTANCES(bf16, 128)

}  // namespace fastok::cuda::sm90
