// A call of label_scores, or of label_tokens, on the CPU: checks and sharing out; the core is in label_scores_simd.cpp.
#pragma once
#include <algorithm>
#include <vector>

#include "common/tensor.h"
#include "sparse/label_scores.h"

namespace fastok {

inline LabelCode label_code_of(const Tensor& data) {
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

class LabelCall {
 public:
  LabelCall(const Tensor& q_in, const Tensor& data_in, const std::optional<Tensor>& scale, const Tensor& channels_in,
            int64_t kv_heads, bool shared, const std::optional<Tensor>& seq_lens)
      : kernels_(pick_label_scores_kernels()) {
    STD_TORCH_CHECK(q_in.dim() == 4 && data_in.dim() == 4 && channels_in.dim() == 2,
                    "q and data must be 4D, channels 2D");
    batch = q_in.size(0), heads = shared ? kv_heads : q_in.size(2), tokens = data_in.size(3);
    const int64_t q_heads = q_in.size(2), r = channels_in.size(1);
    const LabelCode code = label_code_of(data_in);
    const int64_t rows = code == LabelCode::int4 ? (r + 1) / 2 : r;
    STD_TORCH_CHECK(data_in.size(0) == batch && data_in.size(2) == rows && data_in.size(1) > 0 &&
                        channels_in.size(0) > 0 && kv_heads > 0 && q_heads % data_in.size(1) == 0 &&
                        q_heads % channels_in.size(0) == 0 && q_heads % kv_heads == 0 &&
                        data_in.size(1) % kv_heads == 0,
                    "data must be [B,heads,", rows, ",T] for these queries and channels");
    STD_TORCH_CHECK(r <= 256, "at most 256 label channels, got ", r);
    q_ = with_dense_rows(q_in);
    data_ = with_dense_rows(data_in);
    channels_ = checked_contiguous(channels_in, ScalarType::Long, "channels");
    const int64_t* list = const_data<int64_t>(channels_);
    STD_TORCH_CHECK(std::all_of(list, list + channels_.numel(), [&](int64_t c) { return 0 <= c && c < q_.size(3); }),
                    "channels must be within [0, D=", q_.size(3), ")");
    call_.q = q_.const_data_ptr();
    call_.q_dtype = dtype_of(q_, "q");
    call_.q_batch_stride = q_.stride(0), call_.q_row_stride = q_.stride(1), call_.q_head_stride = q_.stride(2);
    call_.rows = q_.size(1), call_.heads = q_heads;
    call_.channels = list, call_.lists = channels_.size(0), call_.r = r;
    call_.data = data_.const_data_ptr(), call_.code = code;
    call_.batch_stride = data_.stride(0), call_.head_stride = data_.stride(1), call_.channel_stride = data_.stride(2);
    call_.labels = data_.size(1);
    if (scale) {
      STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Half && scale->dim() == 3 && scale->size(0) == batch &&
                          scale->size(1) == call_.labels && scale->size(2) == tokens,
                      "scale must be float16 [B,heads,T]");
      scale_ = with_dense_rows(*scale);
      call_.scale = const_data<f16>(scale_);
      call_.scale_batch_stride = scale_.stride(0), call_.scale_head_stride = scale_.stride(1);
    }
    if (seq_lens) {
      lengths_ = torch::stable::to(*seq_lens, ScalarType::Long);
      lengths_ = checked_contiguous(lengths_, ScalarType::Long, "seq_lens");
      STD_TORCH_CHECK(lengths_.numel() == batch, "seq_lens must be [B]");
      call_.lengths = const_data<int64_t>(lengths_);
    }
    call_.out_heads = heads, call_.tokens = tokens;
    per_sample_ = q_heads * call_.rows * r;
    picked_.resize(size_t(batch * per_sample_));
    for (int64_t b = 0; b < batch; ++b) kernels_.gather(call_, b, picked_.data() + b * per_sample_);
  }

  // Scores of the tokens [begin, end) of row b * heads + head, to their places in out[tokens].
  void score(int64_t row, int64_t begin, int64_t end, float* out) const {
    const int64_t b = row / heads;
    kernels_.score(call_, b, row % heads, picked_.data() + b * per_sample_, begin, end, out);
  }
  // All scores, fp32 [batch, heads, tokens], where `like` is.
  Tensor scores(const Tensor& like) const {
    const Tensor out = empty_like_device(like, {batch, heads, tokens}, ScalarType::Float);
    const int64_t chunks = (tokens + kChunk - 1) / kChunk;
    torch::stable::parallel_for(0, batch * heads * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % chunks * kChunk, row = i / chunks;
        score(row, first, std::min(tokens, first + kChunk), fastok::data<float>(out) + row * tokens);
      }
    });
    return out;
  }
  // Tokens that a sample has.
  int64_t length(int64_t b) const { return call_.lengths ? std::clamp<int64_t>(call_.lengths[b], 0, tokens) : tokens; }

  int64_t batch, heads, tokens;  // of the scores

 private:
  static constexpr int64_t kChunk = 4096;  // tokens of one head that are worth handing to another thread

  const LabelScoresKernels& kernels_;
  Tensor q_, data_, channels_, scale_, lengths_;
  LabelScoresCall call_{};
  int64_t per_sample_;
  std::vector<float> picked_;
};

}  // namespace fastok
