// The attention kernels of one element type.
#include "attention/attention_launch.h"

namespace fastok::cuda {
template AttentionKernel attention_kernel_of<float>(int tiles, int width);
}  // namespace fastok::cuda
