// CPU backend of label_scores: checks and sharing out; the core is in label_scores_simd.cpp.
#include <algorithm>
#include <vector>

#include "common/tensor.h"
#include "sparse/label_scores.h"

namespace fastok {
namespace {

constexpr int64_t kTokens = 4096;  // of one head, that are worth handing to another thread

LabelCode code_of(const Tensor& data) {
  if (data.scalar_type() == ScalarType::Char) return LabelCode::int8;
  if (data.scalar_type() == ScalarType::Byte) return LabelCode::int4;
  switch (dtype_of(data, "data")) {
    case Dtype::f16:
      return LabelCode::f16;
    case Dtype::bf16:
      return LabelCode::bf16;
    default:
      return LabelCode::f32;
  }
}

Tensor label_scores(Tensor q, Tensor data, std::optional<Tensor> scale, Tensor channels, int64_t kv_heads, bool shared,
                    std::optional<Tensor> seq_lens) {
  STD_TORCH_CHECK(q.dim() == 4 && data.dim() == 4 && channels.dim() == 2, "q and data must be 4D, channels 2D");
  const int64_t batch = q.size(0), heads = q.size(2), n = data.size(3), r = channels.size(1);
  const LabelCode code = code_of(data);
  const int64_t rows = code == LabelCode::int4 ? (r + 1) / 2 : r;
  STD_TORCH_CHECK(data.size(0) == batch && data.size(2) == rows && data.size(1) > 0 && channels.size(0) > 0 &&
                      kv_heads > 0 && heads % data.size(1) == 0 && heads % channels.size(0) == 0 &&
                      heads % kv_heads == 0 && data.size(1) % kv_heads == 0,
                  "data must be [B,heads,", rows, ",T] for these queries and channels");
  STD_TORCH_CHECK(r <= 256, "at most 256 label channels, got ", r);
  q = with_dense_rows(q);
  data = with_dense_rows(data);
  channels = checked_contiguous(channels, ScalarType::Long, "channels");
  const int64_t* list = const_data<int64_t>(channels);
  STD_TORCH_CHECK(std::all_of(list, list + channels.numel(), [&](int64_t c) { return 0 <= c && c < q.size(3); }),
                  "channels must be within [0, D=", q.size(3), ")");
  const Tensor out = empty_like_device(q, {batch, shared ? kv_heads : heads, n}, ScalarType::Float);
  LabelScoresCall call{};
  call.q = q.const_data_ptr();
  call.q_dtype = dtype_of(q, "q");
  call.q_batch_stride = q.stride(0), call.q_row_stride = q.stride(1), call.q_head_stride = q.stride(2);
  call.rows = q.size(1), call.heads = heads;
  call.channels = list, call.lists = channels.size(0), call.r = r;
  call.data = data.const_data_ptr(), call.code = code;
  call.batch_stride = data.stride(0), call.head_stride = data.stride(1), call.channel_stride = data.stride(2);
  call.labels = data.size(1);
  Tensor scales, lengths;
  if (scale) {
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Half && scale->dim() == 3 && scale->size(0) == batch &&
                        scale->size(1) == call.labels && scale->size(2) == n,
                    "scale must be float16 [B,heads,T]");
    scales = with_dense_rows(*scale);
    call.scale = const_data<f16>(scales);
    call.scale_batch_stride = scales.stride(0), call.scale_head_stride = scales.stride(1);
  }
  if (seq_lens) {
    lengths = torch::stable::to(*seq_lens, ScalarType::Long);
    lengths = checked_contiguous(lengths, ScalarType::Long, "seq_lens");
    STD_TORCH_CHECK(lengths.numel() == batch, "seq_lens must be [B]");
    call.lengths = const_data<int64_t>(lengths);
  }
  call.out = fastok::data<float>(out);
  call.out_heads = out.size(1), call.tokens = n;

  const LabelScoresKernels& kernels = pick_label_scores_kernels();
  const int64_t chunks = (n + kTokens - 1) / kTokens, per_sample = heads * call.rows * r;
  std::vector<float> picked(size_t(batch * per_sample));
  for (int64_t b = 0; b < batch; ++b) kernels.gather(call, b, picked.data() + b * per_sample);
  torch::stable::parallel_for(0, batch * call.out_heads * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = i % chunks, head = i / chunks % call.out_heads, b = i / chunks / call.out_heads;
      kernels.score(call, b, head, picked.data() + b * per_sample, chunk * kTokens, std::min(n, (chunk + 1) * kTokens));
    }
  });
  return out;
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("label_scores", TORCH_BOX(&fastok::label_scores)); }
