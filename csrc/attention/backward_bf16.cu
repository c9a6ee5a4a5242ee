// The kernels of attention's gradient of one element type.
#include "attention/backward_launch.h"

namespace fastok::cuda {

template BackwardKernels backward_kernels_of<bf16>(int);

}  // namespace fastok::cuda
