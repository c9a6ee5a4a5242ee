// CPU backend of double_sparse_decode: its two parts in one call, whose way through Python and the dispatcher takes as
// long as a good part of the work where they are not in the caches.
#include "decode/decode_cpu.h"
#include "sparse/label_tokens_cpu.h"

namespace fastok {
namespace {

std::tuple<Tensor, Tensor, Tensor> double_sparse_decode(Tensor q, Tensor k, Tensor v, std::optional<Tensor> seq_lens,
                                                        std::optional<Tensor> block_table, double scale, double softcap,
                                                        Tensor data, std::optional<Tensor> label_scale, Tensor channels,
                                                        int64_t kv_heads, bool shared, int64_t n_keep, int64_t sink,
                                                        int64_t recent) {
  STD_TORCH_CHECK(!seq_lens || seq_lens->dim() == 1, "seq_lens must be [B]");
  Tensor tokens =
      std::get<0>(label_tokens(q, data, label_scale, channels, kv_heads, shared, n_keep, sink, recent, seq_lens));
  const auto [out, lse] = decode(q, k, v, seq_lens, block_table, scale, softcap, std::nullopt, tokens);
  return {out, lse, tokens};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("double_sparse_decode", TORCH_BOX(&fastok::double_sparse_decode)); }
