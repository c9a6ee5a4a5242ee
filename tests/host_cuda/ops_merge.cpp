// build_map, merge, merge_backward and unmerge, from named arrays to the launches of csrc/merge.
#include "call.h"
#include "merge/merge_launch.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

void build_map(const Call& call) {
  const Tensor& assign = call.array("assign");
  run_build_map(call.launcher(), assign.shape[0], assign.shape[1], call.integer("n_out"), assign.as<int32_t>(),
                call.pointer<int32_t>("offsets"), call.pointer<int32_t>("members"));
}

// One of merge, backward, max_backward, unmerge, with the arrays that it uses.
void rows(const Call& call) {
  MergeParams p{};
  bool all_aligned = true;
  const int64_t channels = call.integer("channels");
  const auto tokens = [&](const char* name) -> TokenRows {
    if (!call.has(name)) return {nullptr, 0, 0};
    const Tensor& x = call.array(name);
    all_aligned &= rows_aligned(x.data, x.strides[0], x.strides[1], channels, element_size(call.dtype()));
    return {x.data, x.strides[0], x.strides[1]};
  };
  p.x = tokens("x"), p.y = tokens("y"), p.grad_y = tokens("grad_y"), p.grad_x = tokens("grad_x");
  p.residual = tokens("residual");
  if (call.has("size")) {
    const Tensor& size = call.array("size");
    p.size = {size.as<float>(), size.strides[0], size.strides[1]};
  }
  if (call.has("size_out")) p.size_out = call.pointer<float>("size_out");
  const std::string &mode = call.word("mode"), &op = call.word("op");
  p.mode = mode == "mean"  ? MergeMode::mean
           : mode == "sum" ? MergeMode::sum
           : mode == "max" ? MergeMode::max
                           : MergeMode::first;
  const Tensor& assign = call.array("assign");
  p.batch = assign.shape[0], p.n = int(assign.shape[1]), p.n_out = int(call.array("offsets").shape[1] - 1);
  p.channels = int(channels);
  p.assign = assign.as<int32_t>(), p.offsets = call.pointer<int32_t>("offsets");
  p.members = call.pointer<int32_t>("members");
  const RowOp which = op == "merge"          ? RowOp::merge
                      : op == "backward"     ? RowOp::backward
                      : op == "max_backward" ? RowOp::max_backward
                                             : RowOp::unmerge;
  run_rows(call.launcher(), which, call.dtype(), all_aligned, p);
}

}  // namespace simt
