// The op decode on the CPU, for ops that consist of it and others.
#pragma once
#include <tuple>

#include "common/tensor.h"

namespace fastok {

std::tuple<Tensor, Tensor> decode(Tensor q, Tensor k, Tensor v, std::optional<Tensor> seq_lens,
                                  std::optional<Tensor> block_table, double scale, double softcap,
                                  std::optional<Tensor> key_bias, std::optional<Tensor> tokens);

}  // namespace fastok
