// The op label_tokens on the CPU, for ops that consist of it and others.
#pragma once
#include <tuple>

#include "common/tensor.h"

namespace fastok {

std::tuple<Tensor, Tensor> label_tokens(Tensor q, Tensor data, std::optional<Tensor> scale, Tensor channels,
                                        int64_t kv_heads, bool shared, int64_t k, int64_t sink, int64_t recent,
                                        std::optional<Tensor> seq_lens);

}  // namespace fastok
