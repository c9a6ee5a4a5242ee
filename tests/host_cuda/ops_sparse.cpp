// label_scores and select_tokens, from named arrays to the launches of csrc/sparse.
#include "call.h"
#include "sparse/label_scores_launch.h"
#include "sparse/select_tokens_launch.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

namespace {

// int64 or int32, if there are any.
Integers integers(const Call& call, const char* name) {
  if (!call.has(name)) return {nullptr, false};
  return {call.array(name).data, call.integer("wide") != 0};
}

}  // namespace

void label_scores(const Call& call) {
  const Tensor &q = call.array("q"), &codes = call.array("data"), &out = call.array("out");
  LabelParams p{};
  p.q = q.data, p.q_dtype = call.dtype();
  p.q_batch_stride = q.strides[0], p.q_row_stride = q.strides[1], p.q_head_stride = q.strides[2];
  p.q_stride = q.strides[3];
  p.rows = int(q.shape[1]), p.heads = int(q.shape[2]), p.width = int(q.shape[3]);
  const Tensor& channels = call.array("channels");
  p.channels = channels.as<int64_t>(), p.lists = int(channels.shape[0]), p.r = int(channels.shape[1]);
  p.data = codes.data, p.labels = int(codes.shape[1]), p.tokens = int(codes.shape[3]);
  p.batch_stride = codes.strides[0], p.head_stride = codes.strides[1], p.channel_stride = codes.strides[2];
  if (call.has("scale")) {
    const Tensor& scale = call.array("scale");
    p.scale = scale.as<f16>(), p.scale_batch_stride = scale.strides[0], p.scale_head_stride = scale.strides[1];
  }
  p.lengths = integers(call, "seq_lens");
  p.out = out.as<float>(), p.out_heads = int(out.shape[1]);
  const std::string& name = call.word("code");
  const LabelCode code = name == "int8"       ? LabelCode::int8
                         : name == "uint8"    ? LabelCode::int4
                         : name == "float16"  ? LabelCode::f16
                         : name == "bfloat16" ? LabelCode::bf16
                                              : LabelCode::f32;
  run_label_scores(call.launcher(), code, q.shape[0], p);
}

void select_tokens(const Call& call) {
  const Tensor &scores = call.array("scores"), &index = call.array("index");
  SelectParams p{};
  p.scores = scores.as<float>(), p.batch_stride = scores.strides[0], p.head_stride = scores.strides[1];
  p.heads = int(scores.shape[1]), p.tokens = int(scores.shape[2]), p.k = int(index.shape[2]);
  p.mass = call.number("mass"), p.sink = int(call.integer("sink")), p.recent = int(call.integer("recent"));
  p.lengths = integers(call, "seq_lens");
  p.index = index.as<int64_t>(), p.count = call.pointer<int64_t>("count");
  const int64_t rows = scores.shape[0] * scores.shape[1];
  const bool by_row = selects_by_row(p.tokens, p.mass > 0);
  Working<int> words("words", by_row ? 0 : select_words(rows, p.tokens));
  Working<uint64_t> candidates("candidates", by_row ? 0 : rows * p.tokens);
  run_select_tokens(call.launcher(), scores.shape[0], words.data(), candidates.data(), p);
}

}  // namespace simt
