// bipartite_match and nearest, from named arrays to the launches of csrc/match.
#include "call.h"
#include "match/match_launch.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

namespace {

bool aligned(const Tensor& x, Dtype dtype) {
  return rows_aligned(x.data, x.strides[0], x.strides[1], 0, element_size(dtype));
}

BatchPositions positions(const Call& call, const char* name, int64_t n, int first) {
  if (!call.has(name)) return {nullptr, 0, first, 2, int((n + 1 - first) / 2)};
  const Tensor& list = call.array(name);
  const bool shared = list.shape.size() == 1;
  return {list.as<int64_t>(), shared ? 0 : list.strides[0], 0, 1, int(list.shape.back())};
}

}  // namespace

void bipartite_match(const Call& call) {
  const Tensor& x = call.array("metric");
  MatchParams p{};
  p.metric = x.data, p.batch_stride = x.strides[0], p.row_stride = x.strides[1];
  p.src = positions(call, "src", x.shape[1], 0), p.dst = positions(call, "dst", x.shape[1], 1);
  if (call.has("bias")) {
    const Tensor& bias = call.array("bias");
    p.bias = bias.as<float>(), p.bias_batch_stride = bias.strides[0], p.bias_stride = bias.strides[1];
  }
  p.n = int(x.shape[1]), p.n_out = int(call.array("offsets").shape[1] - 1);
  p.r = int(call.integer("r")), p.protect = int(call.integer("protect"));
  p.by_threshold = call.numbers.count("threshold") > 0;
  if (p.by_threshold) p.threshold = float(call.number("threshold"));
  p.sorted_order = call.integer("sorted_order") != 0;
  p.shape.width = int(x.shape[2]);
  p.assign = call.pointer<int32_t>("assign"), p.counts = call.pointer<int32_t>("counts");
  p.offsets = call.pointer<int32_t>("offsets"), p.members = call.pointer<int32_t>("members");
  if (p.r <= 0 || p.src.count == 0 || p.dst.count == 0)
    return run_identity(call.launcher(), x.shape[0], p.n, p.assign, p.counts, p.offsets, p.members);
  run_match(call.launcher(), call.dtype(), x.shape[0], aligned(x, call.dtype()), p);
}

void nearest(const Call& call) {
  const Tensor &x = call.array("x"), &y = call.array("y");
  const std::string& similarity = call.word("similarity");
  NearestParams p{};
  p.x = x.data, p.x_batch_stride = x.strides[0], p.x_row_stride = x.strides[1];
  p.y = y.data, p.y_batch_stride = y.strides[0], p.y_row_stride = y.strides[1];
  if (call.has("mask")) {
    const Tensor& mask = call.array("mask");
    p.mask = mask.as<bool>(), p.mask_batch_stride = mask.strides[0], p.mask_stride = mask.strides[1];
  }
  p.n = int(x.shape[1]), p.m = int(y.shape[1]), p.width = int(x.shape[2]), p.k = int(call.integer("k"));
  p.similarity = similarity == "cosine" ? Similarity::cosine
                 : similarity == "dot"  ? Similarity::dot
                                        : Similarity::euclidean;
  p.value = call.pointer<float>("value"), p.index = call.pointer<int64_t>("index");
  run_nearest(call.launcher(), call.dtype(), x.shape[0], aligned(x, call.dtype()) && aligned(y, call.dtype()), p);
}

}  // namespace simt
