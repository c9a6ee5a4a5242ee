// k_center, from named arrays to the launches of csrc/k_center.
#include "call.h"
#include "k_center/k_center_launch.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

void k_center(const Call& call) {
  const Tensor& x = call.array("x");
  CenterParams p{};
  p.x = x.data, p.batch_stride = x.strides[0], p.row_stride = x.strides[1];
  if (call.has("mask")) {
    const Tensor& mask = call.array("mask");
    p.mask = mask.as<bool>(), p.mask_batch_stride = mask.strides[0], p.mask_stride = mask.strides[1];
  }
  if (call.has("first")) p.first = call.array("first").as<int64_t>(), p.first_stride = call.array("first").strides[0];
  p.batch = int(x.shape[0]), p.n = int(x.shape[1]), p.width = int(x.shape[2]), p.k = int(call.integer("k"));
  p.cosine = call.word("metric") == "cosine", p.max_sum = call.word("objective") == "max_sum";
  const std::string& start = call.word("start");
  p.start = start == "isolated" ? CenterStart::isolated : start == "norm" ? CenterStart::norm : CenterStart::given;
  Launcher launch = call.launcher();
  const int arch = int(call.integer("capability"));
  if (arch >= 90) launch.granted_bytes = size_t(call.integer("most_shared_bytes"));
  const CenterPlan plan =
      plan_k_center({p.batch, p.n, p.width, p.k, p.cosine, p.max_sum, p.start == CenterStart::isolated},
                    {arch, launch.granted_bytes});
  p.token_blocks = plan.token_blocks;

  const int64_t tokens = int64_t(p.batch) * p.n;
  const int64_t streamed = plan.launch_per_pick() ? 2 * int64_t(p.batch) * plan.token_blocks : 0;
  Working<float> scale("scale", tokens), gram("gram", int64_t(plan.gram_numbers));
  Working<double> norm("norm", tokens), rank("rank", tokens), value("value", plan.global_values() ? tokens : 0);
  Working<int> isolation("isolation", p.start == CenterStart::isolated ? tokens : 0);
  Working<double> best_value("best_value", p.k < 2 ? 0 : p.k < 3 ? streamed / 2 : streamed);
  Working<int> best_token("best_token", p.k < 2 ? 0 : p.k < 3 ? streamed / 2 : streamed);
  p.scale = scale.data(), p.norm = norm.data(), p.rank = rank.data(), p.isolation = isolation.data();
  p.gram = gram.data(), p.value = value.data(), p.best_value = best_value.data(), p.best_token = best_token.data();
  p.index = call.pointer<int64_t>("index"), p.distance = call.pointer<float>("distance");
  run_k_center(launch, call.dtype(), plan, p);
}

}  // namespace simt
