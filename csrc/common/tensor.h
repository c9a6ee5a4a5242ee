// Small helpers between torch's stable tensors and the torch-free kernels.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "common/dtype.h"

namespace fastok {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x, const char* name, bool allow_f64 = false) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Double:
      if (allow_f64) return Dtype::f64;
      [[fallthrough]];
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
}

inline Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) > 1 && x.stride(last) != 1 ? torch::stable::contiguous(x) : x;
}

inline Tensor checked_contiguous(const Tensor& x, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == dtype, name, " has the wrong dtype");
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// Like torch::stable::empty, which looks its operator up by name at every call and takes several times as long.
inline Tensor empty_like_device(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  constexpr size_t kMostDims = 8;
  STD_TORCH_CHECK(shape.size() <= kMostDims, "at most ", kMostDims, " dimensions, got ", shape.size());
  int64_t stride[kMostDims], elements = 1;
  for (size_t d = shape.size(); d-- > 0; elements *= std::max<int64_t>(shape.begin()[d], 1)) stride[d] = elements;
  int32_t device_type, device_index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.begin(), stride,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device_index, &made));
  return Tensor(made);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}
template <class T>
const T* const_data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

}  // namespace fastok
