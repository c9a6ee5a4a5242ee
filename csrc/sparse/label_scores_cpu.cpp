// CPU backend of label_scores.
#include "sparse/label_call_cpu.h"

namespace fastok {
namespace {

Tensor label_scores(Tensor q, Tensor data, std::optional<Tensor> scale, Tensor channels, int64_t kv_heads, bool shared,
                    std::optional<Tensor> seq_lens) {
  return LabelCall(q, data, scale, channels, kv_heads, shared, seq_lens).scores(q);
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("label_scores", TORCH_BOX(&fastok::label_scores)); }
