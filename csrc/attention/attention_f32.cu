// The attention kernels of one element type.
#include "attention/attention_launch.h"

namespace fastok::cuda {

template AttentionKernel attention_kernel_of<float>(int, int);
template ScoresKernel scores_kernel_of<float>(int);

}  // namespace fastok::cuda
