// What the CUDA bindings of the decode ops share: lists of tokens, room for the parts of splits.
#pragma once
#include "attention/call_cuda.h"
#include "decode/decode_launch.h"

namespace fastok::cuda {

// Token lists as the kernels read them: ascending, none twice.
struct OrderedTokens {
  Tensor ordered, counts, bits;

  // For p.total places.
  void order(Launcher& launch, const Tensor& tokens, const Tensor& q, DecodeParams& p) {
    const int64_t batch = q.size(0), lists = batch * tokens.size(1);
    STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(0) == batch &&
                        (tokens.size(1) == p.heads / p.group || tokens.size(1) == p.heads),
                    "tokens must be [B,G,K] or [B,H,K]");
    check_countable(tokens.size(2), "K");
    check_on_device(tokens, "tokens", q, "q");
    const ScalarType dtype = tokens.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Long || dtype == ScalarType::Int, "tokens must be int64 or int32");
    ListParams list{};
    list.tokens = {tokens.const_data_ptr(), dtype == ScalarType::Long};
    list.batch_stride = tokens.stride(0), list.list_stride = tokens.stride(1), list.stride = tokens.stride(2);
    list.lists = int(tokens.size(1)), list.size = int(tokens.size(2)), list.total = p.total;
    list.words = list_words(p.total);
    ordered = empty_like_device(q, {lists * list.size + 1}, ScalarType::Int);  // never without an address
    counts = empty_like_device(q, {lists}, ScalarType::Int);
    bits = empty_like_device(q, {lists * list.words}, ScalarType::Int);
    list.ordered = data<int>(ordered), list.counts = data<int>(counts);
    list.bits = reinterpret_cast<uint32_t*>(data<int>(bits));
    run_order_tokens(launch, batch, list);
    p.tokens = list.ordered, p.token_counts = list.counts, p.lists = list.lists, p.list_size = list.size;
  }
};

// Where splits leave their parts.
struct SplitParts {
  Tensor out, lse;

  SplitParts(const Tensor& q, int splits, DecodeParams& p) {
    if (splits == 1) return;
    out = floats(q, splits * p.lse_rows * p.v_width), lse = floats(q, splits * p.lse_rows);
    p.split_out = data<float>(out), p.split_lse = data<float>(lse);
  }
};

}  // namespace fastok::cuda
