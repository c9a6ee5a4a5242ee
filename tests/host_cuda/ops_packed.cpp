// kv_seal, kv_unseal and decode over packed caches, from named arrays to the launches of csrc.
#include <array>
#include <stdexcept>

#include "decode/packed_launch.h"
#include "decode_call.h"
#include "quantize/quantize_launch.h"

namespace simt {

using namespace fastok;
using namespace fastok::cuda;

namespace {

KvFormat format_of(const Call& call, int64_t width) {
  std::array<int64_t, 11> ints;
  for (size_t i = 0; i < ints.size(); ++i) ints[i] = call.integer("fmt_" + std::to_string(i));
  KvFormat fmt;
  if (!KvFormat::of(ints.data(), ints.size(), width, fmt)) throw std::runtime_error("fmt is no packed KV format");
  return fmt;
}

template <class T>
void strided(const Call& call, const char* name, const T*& data, int64_t (&strides)[3]) {
  if (!call.has(name)) return;
  const Tensor& x = call.array(name);
  data = x.as<T>();
  for (size_t i = 0; i < 3; ++i) strides[i] = x.strides[i];
}

PackedView packed_view(const Call& call) {
  const Tensor& hot = call.array("hot_k");
  PackedView view{};
  view.fmt = format_of(call, hot.shape[3]);
  view.data = call.pointer<uint8_t>("data");
  view.bytes = call.array("data").shape[0];
  strided(call, "offset", view.offset, view.offset_strides);
  strided(call, "counts", view.counts, view.counts_strides);
  strided(call, "classes", view.classes, view.classes_strides);
  for (int which = 0; which < 2; ++which) {
    const char* const channels = which ? "value_channels" : "key_channels";
    if (call.has(channels)) view.channels[which] = call.pointer<f16>(channels);
    const uint8_t* hot_data = nullptr;
    strided(call, which ? "hot_v" : "hot_k", hot_data, view.hot_strides[which]);
    view.hot[which] = hot_data;
  }
  view.hot_lengths = call.pointer<int32_t>("hot_len");
  view.groups = int(hot.shape[1]), view.window = int(hot.shape[2]), view.pages = int(call.array("offset").shape[2]);
  return view;
}

}  // namespace

void kv_seal(const Call& call) {
  SealParams p{};
  const Tensor &k = call.array("k"), &offset = call.array("offset");
  p.fmt = format_of(call, k.shape[3]);
  p.data = call.pointer<uint8_t>("data"), p.bytes = call.array("data").shape[0];
  p.offset = offset.as<int64_t>(), p.classes = call.has("classes") ? call.pointer<uint8_t>("classes") : nullptr;
  for (int which = 0; which < 2; ++which) {
    const char* const channels = which ? "value_channels" : "key_channels";
    if (call.has(channels)) p.channels[which] = call.pointer<f16>(channels);
    const uint8_t* source = nullptr;
    strided(call, which ? "v" : "k", source, p.strides[which]);
    p.source[which] = source;
    p.gamma[which] = float(call.number(which ? "value_gamma" : "key_gamma"));
  }
  p.groups = int(k.shape[2]), p.pages = int(offset.shape[2]);
  run_kv_seal(call.launcher(), call.dtype(), k.shape[0], p);
}

void kv_unseal(const Call& call) {
  UnsealParams p{};
  p.cache = packed_view(call);
  p.out[0] = call.pointer<void>("k"), p.out[1] = call.pointer<void>("v"), p.total = int(call.integer("total"));
  run_kv_unseal(call.launcher(), call.dtype(), call.array("hot_k").shape[0], p);
}

void decode_packed(const Call& call) {
  const Tensor& q = call.array("q");
  const int64_t batch = q.shape[0];
  PackedParams params{};
  params.cache = packed_view(call);
  DecodeParams& p = params.decode;
  p.q = token_heads(q);
  p.rows = int(q.shape[1]), p.heads = int(q.shape[2]), p.group = p.heads / params.cache.groups;
  p.width = p.v_width = int(q.shape[3]), p.total = int(packed_capacity(params.cache));
  read_extras(call, p);
  params.bias_places = call.has("key_bias") ? int(call.array("key_bias").shape.back()) : 0;
  OrderedTokens ordered(call, batch, p);
  const PackedPlan plan = plan_for(params, call.dtype());
  const int64_t partial = plan.splits > 1 ? plan.splits * p.lse_rows : 0;
  Working<float> split_out("split_out", partial * p.v_width), split_lse("split_lse", partial);
  p.split_out = split_out.data(), p.split_lse = split_lse.data();
  run_packed(ordered.launch, call.dtype(), batch, plan, params);
}

}  // namespace simt
