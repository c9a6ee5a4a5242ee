// max_coverage, from named arrays to the launches of csrc/max_coverage.
#include "call.h"
#include "max_coverage/max_coverage_launch.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

void max_coverage(const Call& call) {
  CoverageParams p{};
  const bool pair = p.pair = !call.has("similarity");
  if (pair) {
    const Tensor &y = call.array("y"), &x = call.array("x");
    p.y = y.data, p.y_batch_stride = y.strides[0], p.y_row_stride = y.strides[1];
    p.x = x.data, p.x_batch_stride = x.strides[0], p.x_row_stride = x.strides[1];
    p.batch = int(x.shape[0]), p.rows = int(y.shape[1]), p.n = int(x.shape[1]), p.width = int(x.shape[2]);
  } else {
    const Tensor& matrix = call.array("similarity");
    p.matrix = matrix.data, p.matrix_batch_stride = matrix.strides[0];
    p.matrix_row_stride = matrix.strides[1], p.matrix_stride = matrix.strides[2];
    p.batch = int(matrix.shape[0]), p.rows = int(matrix.shape[1]), p.n = int(matrix.shape[2]);
  }
  p.k = int(call.integer("k"));
  if (call.has("modular")) {
    const Tensor& modular = call.array("modular");
    p.modular = modular.as<float>(), p.modular_batch_stride = modular.strides[0], p.modular_stride = modular.strides[1];
  }
  const CoveragePlan& plan = p.plan = plan_max_coverage(p.batch, p.rows, p.n, pair, call.integer("most_similarities"));

  const int64_t rows = int64_t(p.batch) * p.rows, tokens = int64_t(p.batch) * p.n;
  Working<float> y_scale("y_scale", pair ? rows : 0), x_scale("x_scale", pair ? tokens : 0);
  Working<double> y_norm("y_norm", pair ? rows : 0), x_norm("x_norm", pair ? tokens : 0);
  Working<float> kept("kept", plan.kept ? rows * p.n : 0);
  Working<int> peak("peak", p.batch), runner_up("runner_up", p.batch);
  Working<double> covered("covered", p.k > 1 ? rows : 0);
  Working<double> runner_up_gain("runner_up_gain", p.k > 1 ? int64_t(p.batch) * plan.row_blocks : 0);
  Working<uint64_t> rank("rank", (p.k > 1 ? 2 : 1) * tokens);
  p.y_scale = y_scale.data(), p.y_norm = y_norm.data(), p.x_scale = x_scale.data(), p.x_norm = x_norm.data();
  p.kept = kept.data(), p.peak = peak.data(), p.covered = covered.data(), p.rank = rank.data();
  p.runner_up = runner_up.data(), p.runner_up_gain = runner_up_gain.data();
  p.index = call.pointer<int64_t>("index"), p.gain = call.pointer<float>("gain");
  run_max_coverage(call.launcher(), call.dtype(), p);
}

}  // namespace simt
