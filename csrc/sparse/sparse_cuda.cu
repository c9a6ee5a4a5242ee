// CUDA backend of label_scores and select_tokens: checks and launches. Kernels are in label_scores_kernel.cuh and
// select_tokens_kernel.cuh.
#include <tuple>

#include "common/launch.h"
#include "sparse/label_scores_launch.h"
#include "sparse/select_tokens_launch.h"

namespace fastok::cuda {
namespace {

LabelCode code_of(const Tensor& data) {
  if (data.scalar_type() == ScalarType::Char) return LabelCode::int8;
  if (data.scalar_type() == ScalarType::Byte) return LabelCode::int4;
  const Dtype dtype = dtype_of(data, "data");
  return dtype == Dtype::f16 ? LabelCode::f16 : dtype == Dtype::bf16 ? LabelCode::bf16 : LabelCode::f32;
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
  STD_TORCH_CHECK(r <= kMostChannels, "at most ", kMostChannels, " label channels, got ", r);
  check_on_device(data, "data", q, "q");
  check_on_device(channels, "channels", q, "q");
  check_countable(n, "T");
  check_countable(heads * q.size(1), "q's heads times rows");
  const Tensor codes = with_dense_rows(data), list = checked_contiguous(channels, ScalarType::Long, "channels");
  const int64_t out_heads = shared ? kv_heads : heads;
  const Tensor out = empty_like_device(q, {batch, out_heads, n}, ScalarType::Float);
  if (out.numel() == 0) return out;
  check_grid(batch * out_heads * (n / (4 * kLabelThreads) + 1), "data");

  LabelParams p{};
  p.q = q.const_data_ptr(), p.q_dtype = dtype_of(q, "q");
  p.q_batch_stride = q.stride(0), p.q_row_stride = q.stride(1), p.q_head_stride = q.stride(2), p.q_stride = q.stride(3);
  p.rows = int(q.size(1)), p.heads = int(heads), p.width = int(q.size(3));
  p.channels = const_data<int64_t>(list), p.lists = int(channels.size(0)), p.r = int(r);
  p.data = codes.const_data_ptr(), p.labels = int(codes.size(1));
  p.batch_stride = codes.stride(0), p.head_stride = codes.stride(1), p.channel_stride = codes.stride(2);
  Tensor scales;
  if (scale) {
    STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Half, "scale must be float16");
    check_shape(*scale, "scale", {batch, data.size(1), n});
    check_on_device(*scale, "scale", q, "q");
    scales = with_dense_rows(*scale);
    p.scale = const_data<f16>(scales), p.scale_batch_stride = scales.stride(0), p.scale_head_stride = scales.stride(1);
  }
  Tensor lengths;
  if (seq_lens) {
    check_shape(*seq_lens, "seq_lens", {batch});
    p.lengths = integers_of(*seq_lens, "seq_lens", q, lengths);
  }
  p.out = fastok::data<float>(out), p.out_heads = int(out_heads), p.tokens = int(n);
  run_label_scores(Launcher(q), code, batch, p);
  return out;
}

std::tuple<Tensor, Tensor> select_tokens(Tensor scores, int64_t k, std::optional<double> mass, int64_t sink,
                                         int64_t recent, std::optional<Tensor> seq_lens) {
  STD_TORCH_CHECK(scores.dim() == 3 && scores.scalar_type() == ScalarType::Float, "scores must be float32 [B,G,T]");
  const int64_t batch = scores.size(0), heads = scores.size(1), n = scores.size(2);
  STD_TORCH_CHECK(0 <= k && k <= n && sink >= 0 && recent >= 0, "k must be within [0, T], sink and recent at least 0");
  STD_TORCH_CHECK(k == n || (sink <= k && recent <= k - sink), "k must have room for sink + recent tokens");
  STD_TORCH_CHECK(!mass || (0 < *mass && *mass <= 1), "mass must be within (0, 1]");
  check_countable(n, "T");
  check_grid(batch * heads * (select_tiles(n) + 1), "scores");
  const Tensor rows = with_dense_rows(scores);
  const Tensor index = empty_like_device(scores, {batch, heads, k}, ScalarType::Long);
  const Tensor count = empty_like_device(scores, {batch, heads}, ScalarType::Long);
  if (batch * heads == 0) return {index, count};

  SelectParams p{};
  p.scores = const_data<float>(rows), p.batch_stride = rows.stride(0), p.head_stride = rows.stride(1);
  p.heads = int(heads), p.tokens = int(n), p.k = int(k), p.mass = mass ? *mass : 0.0;
  p.sink = int(sink < n ? sink : n), p.recent = int(recent < n ? recent : n);
  p.index = data<int64_t>(index), p.count = data<int64_t>(count);
  Tensor lengths, words, candidates;
  if (seq_lens) {
    check_shape(*seq_lens, "seq_lens", {batch});
    p.lengths = integers_of(*seq_lens, "seq_lens", scores, lengths);
  }
  if (!selects_by_row(n, mass.has_value())) {
    words = empty_like_device(scores, {select_words(batch * heads, n)}, ScalarType::Int);
    candidates = empty_like_device(scores, {batch * heads * n}, ScalarType::Long);
  }
  run_select_tokens(Launcher(scores), batch, words.defined() ? data<int>(words) : nullptr,
                    candidates.defined() ? reinterpret_cast<uint64_t*>(data<int64_t>(candidates)) : nullptr, p);
  return {index, count};
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) {
  m.impl("label_scores", TORCH_BOX(&fastok::cuda::label_scores));
  m.impl("select_tokens", TORCH_BOX(&fastok::cuda::select_tokens));
}
