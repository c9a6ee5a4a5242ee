// top_tokens, sample_cdf and density_peaks, from named arrays to the launches of csrc/select.
#include "call.h"
#include "select/select_launch.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

void top_tokens(const Call& call) {
  const Tensor &scores = call.array("scores"), &budgets = call.array("k");
  TopParams p{};
  p.scores = scores.data, p.batch_stride = scores.strides[0], p.stride = scores.strides[1];
  if (call.has("mask")) {
    const Tensor& mask = call.array("mask");
    p.mask = mask.as<bool>(), p.mask_batch_stride = mask.strides[0], p.mask_stride = mask.strides[1];
  }
  if (call.has("segments")) {
    const Tensor& segments = call.array("segments");
    p.segments = segments.as<int64_t>();
    p.segment_batch_stride = segments.strides[0], p.segment_stride = segments.strides[1];
  }
  p.n = int(scores.shape[1]), p.protect = int(call.integer("protect")), p.n_segments = int(budgets.shape[0]);
  p.total = int(call.array("out").shape[1]) - p.protect, p.by_score = call.integer("by_score") != 0;
  p.out = call.pointer<int64_t>("out");
  Working<Cut> cuts("cuts", p.segments ? scores.shape[0] * p.n_segments : 0);
  Working<int64_t> picks("picks", needs_picks(p.total, p.by_score) ? scores.shape[0] * p.total : 0);
  p.cuts = cuts.data(), p.picks = picks.data();
  run_top(call.launcher(), call.dtype(), scores.shape[0], budgets.as<int64_t>(), p);
}

void sample_cdf(const Call& call) {
  const Tensor& scores = call.array("scores");
  SampleParams p{};
  p.scores = scores.data, p.batch_stride = scores.strides[0], p.stride = scores.strides[1];
  p.n = int(scores.shape[1]), p.n_out = int(call.array("offsets").shape[1] - 1);
  p.protect = int(call.integer("protect")), p.heights = call.integer("k") - p.protect;
  const int64_t n_free = p.n - p.protect, width = n_free > kSampledInBlock ? power_of_two(n_free) : 0;
  Working<uint64_t> order("order", scores.shape[0] * width);
  Working<double> total("total", scores.shape[0] * width);
  p.order = order.data(), p.total = total.data();
  p.assign = call.pointer<int32_t>("assign"), p.counts = call.pointer<int32_t>("counts");
  p.offsets = call.pointer<int32_t>("offsets"), p.members = call.pointer<int32_t>("members");
  run_sample(call.launcher(), call.dtype(), scores.shape[0], p);
}

void density_peaks(const Call& call) {
  const Tensor& x = call.array("x");
  PeaksParams p{};
  p.x = x.data, p.batch_stride = x.strides[0], p.row_stride = x.strides[1];
  p.n = int(x.shape[1]), p.width = int(x.shape[2]), p.neighbors = int(call.integer("neighbors"));
  const Tensor& out = call.array("out");
  const int64_t batch = x.shape[0], tokens = batch * p.n, k = out.shape[1];
  Working<float> value("value", tokens * p.neighbors), score("score", tokens);
  Working<int64_t> index("index", tokens * p.neighbors), peaks("peaks", tokens);
  Working<double> spread("spread", tokens);
  Working<int32_t> peak_count("peak_count", batch);
  Working<int64_t> picks("picks", needs_picks(k, true) ? batch * k : 0);
  p.value = value.data(), p.index = index.data(), p.spread = spread.data();
  p.peaks = peaks.data(), p.peak_count = peak_count.data(), p.score = score.data();
  run_peaks(call.launcher(), call.dtype(), batch, k, picks.data(), out.as<int64_t>(), p);
}

}  // namespace simt
