// The attention kernels of one element type.
#include "attention/attention_launch.h"

namespace fastok::cuda {

template AttentionKernel attention_kernel_of<f16>(int, int);
template ScoresKernel scores_kernel_of<f16>(int);

}  // namespace fastok::cuda
