// Makes tensor maps by the CUDA driver, which is asked for through the runtime: libcuda is not linked.
#pragma once
#include <cudaTypedefs.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <cstring>

#include "common/tensor.h"
#include "common/tensor_map.h"

namespace fastok::cuda {

inline TensorMap encode_tensor_map(const TiledArray& array) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    STD_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    STD_TORCH_CHECK(found == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  CUtensorMap map;
  static_assert(sizeof(map) == sizeof(TensorMap) && alignof(CUtensorMap) <= alignof(TensorMap));
  const cuuint64_t sizes[] = {array.sizes[0], array.sizes[1], array.sizes[2], array.sizes[3]};
  const cuuint64_t strides[] = {array.strides[0], array.strides[1], array.strides[2]};
  const cuuint32_t tile[] = {array.tile[0], array.tile[1], array.tile[2], array.tile[3]}, steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, array.dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(array.data), sizes, strides, tile, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with error ", int(result));
  TensorMap out;
  std::memcpy(out.bytes, &map, sizeof(map));
  return out;
}

}  // namespace fastok::cuda
