// Which kernels pack and unpack pages, with what. `launch` as in decode_launch.h. Torch-free.
#pragma once
#include "quantize/quantize_kernel.cuh"

namespace fastok::cuda {

template <class Launch>
void run_kv_seal(Launch&& launch, Dtype dtype, int64_t batch, SealParams p) {
  p.cosines = Cosines::make();
  const auto kernel = dtype == Dtype::f16    ? kv_seal_kernel<f16>
                      : dtype == Dtype::bf16 ? kv_seal_kernel<bf16>
                                             : kv_seal_kernel<float>;
  launch(dim3(unsigned(batch * p.groups * p.pages)), dim3(kQuantizeThreads), seal_bytes(p.fmt), kernel, p);
}

template <class Launch>
void run_kv_unseal(Launch&& launch, Dtype dtype, int64_t batch, UnsealParams p) {
  p.cosines = Cosines::make();
  const auto kernel = dtype == Dtype::f16    ? kv_unseal_kernel<f16>
                      : dtype == Dtype::bf16 ? kv_unseal_kernel<bf16>
                                             : kv_unseal_kernel<float>;
  launch(dim3(unsigned(batch * p.cache.groups * (p.cache.pages + 1))), dim3(kQuantizeThreads), unseal_bytes(), kernel,
         p);
}

}  // namespace fastok::cuda
