// What the decode ops have in common: options, lists of tokens, results.
#pragma once
#include "call.h"
#include "decode/decode_launch.h"

namespace simt {

inline fastok::cuda::TokenHeads token_heads(const Tensor& x) {
  return {x.data, x.strides[0], x.strides[1], x.strides[2]};
}

// `name` and whether it holds int64, which Python tells.
inline fastok::cuda::Integers integers(const Call& call, const std::string& name) {
  if (!call.has(name)) return {nullptr, false};
  return {call.array(name).data, call.integer(name + "_wide") != 0};
}

inline void read_extras(const Call& call, fastok::cuda::DecodeParams& p) {
  p.rule = fastok::cuda::logit_rule(call.number("scale"), call.number("softcap"), false);
  if (call.has("key_bias")) {
    const Tensor& bias = call.array("key_bias");
    p.bias = {bias.as<float>(), bias.strides[0], bias.shape.size() == 3 ? bias.strides[1] : 0, bias.strides.back()};
  }
  p.out = call.pointer<void>("out"), p.lse = call.pointer<float>("lse");
  p.lse_rows = call.array("lse").shape[0] * p.heads * p.rows;
}

// Lists of tokens as kernels read them: ordered once p knows how many places there are.
struct OrderedTokens {
  static fastok::cuda::ListParams given(const Call& call, int total) {
    fastok::cuda::ListParams list{};
    if (!call.has("tokens")) return list;
    const Tensor& tokens = call.array("tokens");
    list.tokens = integers(call, "tokens");
    list.batch_stride = tokens.strides[0], list.list_stride = tokens.strides[1], list.stride = tokens.strides[2];
    list.lists = int(tokens.shape[1]), list.size = int(tokens.shape[2]), list.total = total;
    list.words = fastok::cuda::list_words(total);
    return list;
  }

  fastok::cuda::ListParams list;
  Working<int> ordered, counts;
  Working<uint32_t> bits;
  Launcher launch;

  OrderedTokens(const Call& call, int64_t batch, fastok::cuda::DecodeParams& p)
      : list(given(call, p.total)),
        ordered("ordered", batch * list.lists * list.size + 1),
        counts("counts", batch * list.lists),
        bits("bits", batch * list.lists * list.words),
        launch(call.launcher()) {
    if (list.lists == 0) return;
    list.ordered = ordered.data(), list.counts = counts.data(), list.bits = bits.data();
    run_order_tokens(launch, batch, list);
    p.tokens = list.ordered, p.token_counts = list.counts, p.lists = list.lists, p.list_size = list.size;
  }
};

}  // namespace simt
