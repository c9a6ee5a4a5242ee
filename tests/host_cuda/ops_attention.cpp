// attention, its gradient and attention_scores, from named arrays to the launches of csrc/attention.
#include "attention/attention_launch.h"
#include "attention/backward_launch.h"
#include "call.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

namespace {

// What the bindings allocate besides the results: poisoned, and like these to be written before it is read.
class Workspace {
 public:
  float* take(const char* name, int64_t count) {
    kept_.emplace_back(size_t(count), __builtin_nanf(""));
    float* const data = kept_.back().data();
    add_output(name, data, count, sizeof(float));
    return data;
  }

 private:
  std::vector<std::vector<float>> kept_;
};

TokenHeads token_heads(const Tensor& x) {
  const bool packed = x.shape.size() == 3;
  const size_t n = x.strides.size();
  return {x.data, packed ? 0 : x.strides[0], x.strides[n - 3], x.strides[n - 2]};
}

// [B, T] or [B, H, T], packed [total] or [H, total]: told by whether there is a head axis.
HeadNumbers head_numbers(const Call& call, const char* name, bool packed) {
  if (!call.has(name)) return {nullptr, 0, 0, 0};
  const Tensor& x = call.array(name);
  const size_t n = x.shape.size();
  const bool per_head = n == (packed ? 2 : 3);
  return {x.as<float>(), packed ? 0 : x.strides[0], per_head ? x.strides[n - 2] : 0, x.strides[n - 1]};
}

Sequences sequences(const Call& call) {
  const Tensor &q = call.array("q"), &k = call.array("k");
  const size_t axis = q.shape.size() - 3;
  Sequences s{nullptr, nullptr, int(q.shape[0]), int(q.shape[axis]), int(k.shape[axis])};
  if (axis == 0) {
    s.q_offsets = call.pointer<int32_t>("cu_seqlens_q"), s.k_offsets = call.pointer<int32_t>("cu_seqlens_k");
    s.count = int(call.array("cu_seqlens_q").shape[0]) - 1;
  }
  return s;
}

int capability(const Call& call) { return int(call.integer("capability")); }
// Only Hopper's kernels may take more shared memory than every device grants.
Launcher launcher(const Call& call, bool sm90) {
  Launcher launch = call.launcher();
  if (sm90) launch.granted_bytes = sm90::kMostSharedBytes;
  return launch;
}

AttentionParams problem(const Call& call, bool raw) {
  const Tensor& q = call.array("q");
  AttentionParams p{};
  p.sequences = sequences(call);
  p.q = token_heads(q), p.k = token_heads(call.array("k"));
  p.heads = int(*(q.shape.end() - 2)), p.group = p.heads / int(*(call.array("k").shape.end() - 2));
  p.width = int(q.shape.back());
  p.rows = {nullptr, 0, p.sequences.packed() ? kFarAway : p.sequences.n_q};
  p.window = window_of(call.integer("left"), call.integer("right"));
  p.rule = logit_rule(call.number("scale"), call.number("softcap"), raw);
  p.bias = head_numbers(call, "key_bias", p.sequences.packed());
  return p;
}

}  // namespace

void attention(const Call& call) {
  AttentionParams p = problem(call, false);
  p.v = token_heads(call.array("v")), p.v_width = int(call.array("v").shape.back());
  p.out = call.pointer<void>("out"), p.lse = call.pointer<float>("lse");
  const std::vector<int64_t>& rows = call.array("lse").shape;
  p.lse_head_stride = rows.back(), p.lse_batch_stride = p.lse_head_stride * p.heads;
  p.lse_rows = p.lse_batch_stride * (p.sequences.packed() ? 1 : p.sequences.count);
  const AttentionPlan plan =
      plan_for(p, call.dtype(), call.integer("max_seqlen_q"), call.integer("max_seqlen_k"), capability(call));
  Workspace workspace;
  if (plan.splits > 1) {
    p.split_out = workspace.take("split_out", plan.splits * p.lse_rows * p.v_width);
    p.split_lse = workspace.take("split_lse", plan.splits * p.lse_rows);
  }
  run_attention(launcher(call, plan.sm90), call.dtype(), plan, p);
}

void attention_backward(const Call& call) {
  const AttentionParams about = problem(call, false);
  BackwardParams p{};
  p.q = about.q, p.k = about.k, p.sequences = about.sequences, p.window = about.window, p.rule = about.rule;
  p.bias = about.bias, p.heads = about.heads, p.group = about.group, p.width = about.width;
  const bool packed = p.sequences.packed();
  p.v = token_heads(call.array("v")), p.v_width = int(call.array("v").shape.back());
  p.out = token_heads(call.array("out")), p.d_out = token_heads(call.array("grad_out"));
  p.lse = head_numbers(call, "lse", packed), p.d_lse = head_numbers(call, "grad_lse", packed);
  p.scale = float(call.number("scale"));
  p.row_head_stride = p.sequences.n_q, p.row_batch_stride = p.row_head_stride * p.heads;
  p.rows = p.row_batch_stride * (packed ? 1 : p.sequences.count);
  p.d_q = call.pointer<void>("grad_q"), p.d_k = call.pointer<void>("grad_k"), p.d_v = call.pointer<void>("grad_v");
  p.bias_by_head = p.bias.data && p.bias.head_stride != 0;
  if (p.bias.data) p.d_bias = call.pointer<float>("grad_bias");
  Workspace workspace;
  run_backward(call.launcher(), call.dtype(), workspace.take("workspace", backward_workspace(p)), p);
}

void attention_scores(const Call& call) {
  const AttentionParams about = problem(call, call.integer("logits") != 0);
  ScoreParams p{};
  p.q = about.q, p.k = about.k, p.sequences = about.sequences, p.window = about.window, p.rule = about.rule;
  p.bias = about.bias, p.heads = about.heads, p.group = about.group, p.width = about.width;
  const bool packed = p.sequences.packed();
  p.weight = head_numbers(call, "key_weight", packed), p.lse = head_numbers(call, "lse", packed);
  p.rows = {nullptr, int(call.integer("row_begin")), int(call.integer("row_end"))};
  if (call.has("rows")) p.rows = {call.pointer<int64_t>("rows"), 0, int(call.array("rows").shape[0])};
  p.col_begin = int(call.integer("col_begin")), p.col_end = int(call.integer("col_end"));
  const std::string& reduce = call.word("reduce");
  p.reduce = reduce == "sum" ? ScoreReduce::sum : reduce == "max" ? ScoreReduce::max : ScoreReduce::none;
  p.logits = call.integer("logits") != 0, p.head_max = call.integer("head_max") != 0;
  p.head_group = int(call.integer("head_group"));
  p.out = call.pointer<float>("scores"), p.n_cols = int(call.array("scores").shape.back());
  p.n_rows = int(call.integer("n_rows"));

  Workspace workspace;
  const ScorePlan plan = plan_for(p, call.dtype(), capability(call));
  Launcher launch = launcher(call, plan.sm90);
  if (!p.logits && (!p.lse.data || call.integer("over_cols") != 0)) {
    AttentionParams pass = lse_pass(p, call.integer("over_cols") != 0);
    const AttentionPlan lse_plan =
        plan_for(pass, call.dtype(), call.integer("max_seqlen_q"), call.integer("max_seqlen_k"), capability(call));
    if (pass.lse_rows > 0) {
      pass.lse = workspace.take("row_lse", pass.lse_rows);
      if (lse_plan.splits > 1) pass.split_lse = workspace.take("split_lse", lse_plan.splits * pass.lse_rows);
      run_attention(launch, call.dtype(), lse_plan, pass);
    }
    use_lse(p, pass);
  }
  const int64_t pieces = pieces_size(p, plan);
  run_scores(launch, call.dtype(), plan, pieces > 0 ? workspace.take("pieces", pieces) : nullptr, p);
}

}  // namespace simt
