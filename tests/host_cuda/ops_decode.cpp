// decode over dense and paged caches, from named arrays to the launches of csrc/decode.
#include "decode_call.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

void decode(const Call& call) {
  const Tensor &q = call.array("q"), &k = call.array("k");
  const int64_t batch = q.shape[0];
  DecodeParams p{};
  p.q = token_heads(q), p.k = token_heads(k), p.v = token_heads(call.array("v"));
  p.rows = int(q.shape[1]), p.heads = int(q.shape[2]), p.group = p.heads / int(k.shape[2]);
  p.width = int(q.shape[3]), p.v_width = int(call.array("v").shape[3]), p.page = p.total = int(k.shape[1]);
  p.pages = int(k.shape[0]);
  if (call.has("block_table")) {
    const Tensor& table = call.array("block_table");
    p.table = integers(call, "block_table");
    p.table_batch_stride = table.strides[0], p.table_stride = table.strides[1];
    p.total = int(table.shape[1]) * p.page;
  }
  p.lengths = integers(call, "seq_lens");
  p.lengths_by_head = call.has("seq_lens") && call.array("seq_lens").shape.size() == 2;
  read_extras(call, p);
  OrderedTokens ordered(call, batch, p);
  const DecodePlan plan = plan_for(p, call.dtype());
  const int64_t partial = plan.splits > 1 ? plan.splits * p.lse_rows : 0;
  Working<float> split_out("split_out", partial * p.v_width), split_lse("split_lse", partial);
  p.split_out = split_out.data(), p.split_lse = split_lse.data();
  run_decode(ordered.launch, call.dtype(), batch, plan, p);
}

}  // namespace simt
