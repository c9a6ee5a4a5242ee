// decode over dense and paged caches, from named arrays to the launches of csrc/decode.
#include "call.h"
#include "decode/decode_launch.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

namespace {

TokenHeads token_heads(const Tensor& x) { return {x.data, x.strides[0], x.strides[1], x.strides[2]}; }

// `name` and whether it holds int64, which Python tells.
Integers integers(const Call& call, const std::string& name) {
  if (!call.has(name)) return {nullptr, false};
  return {call.array(name).data, call.integer(name + "_wide") != 0};
}

}  // namespace

void decode(const Call& call) {
  const Tensor &q = call.array("q"), &k = call.array("k");
  const int64_t batch = q.shape[0];
  DecodeParams p{};
  p.q = token_heads(q), p.k = token_heads(k), p.v = token_heads(call.array("v"));
  p.rows = int(q.shape[1]), p.heads = int(q.shape[2]), p.group = p.heads / int(k.shape[2]);
  p.width = int(q.shape[3]), p.v_width = int(call.array("v").shape[3]), p.page = p.total = int(k.shape[1]);
  p.pages = int(k.shape[0]);
  p.rule = logit_rule(call.number("scale"), call.number("softcap"), false);
  if (call.has("block_table")) {
    const Tensor& table = call.array("block_table");
    p.table = integers(call, "block_table");
    p.table_batch_stride = table.strides[0], p.table_stride = table.strides[1];
    p.total = int(table.shape[1]) * p.page;
  }
  p.lengths = integers(call, "seq_lens");
  p.lengths_by_head = call.has("seq_lens") && call.array("seq_lens").shape.size() == 2;
  if (call.has("key_bias")) {
    const Tensor& bias = call.array("key_bias");
    p.bias = {bias.as<float>(), bias.strides[0], bias.shape.size() == 3 ? bias.strides[1] : 0, bias.strides.back()};
  }
  ListParams list{};
  if (call.has("tokens")) {
    const Tensor& tokens = call.array("tokens");
    list.tokens = integers(call, "tokens");
    list.batch_stride = tokens.strides[0], list.list_stride = tokens.strides[1], list.stride = tokens.strides[2];
    list.lists = int(tokens.shape[1]), list.size = int(tokens.shape[2]), list.total = p.total;
    list.words = list_words(p.total);
  }
  Working<int> ordered("ordered", batch * list.lists * list.size + 1), counts("counts", batch * list.lists);
  Working<uint32_t> bits("bits", batch * list.lists * list.words);
  Launcher launch = call.launcher();
  if (list.lists > 0) {
    list.ordered = ordered.data(), list.counts = counts.data(), list.bits = bits.data();
    run_order_tokens(launch, batch, list);
    p.tokens = list.ordered, p.token_counts = list.counts, p.lists = list.lists, p.list_size = list.size;
  }
  p.out = call.pointer<void>("out"), p.lse = call.pointer<float>("lse"), p.lse_rows = batch * p.heads * p.rows;
  const DecodePlan plan = plan_for(p, call.dtype());
  const int64_t partial = plan.splits > 1 ? plan.splits * p.lse_rows : 0;
  Working<float> split_out("split_out", partial * p.v_width), split_lse("split_lse", partial);
  p.split_out = split_out.data(), p.split_lse = split_lse.data();
  run_decode(launch, call.dtype(), batch, plan, p);
}

}  // namespace simt
