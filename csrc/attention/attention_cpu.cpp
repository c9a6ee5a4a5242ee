// CPU backend of attention: sharing out heads, rows and, for few rows, keys. The arithmetic is in attention_simd.cpp.
#include <tuple>
#include <vector>

#include "attention/call_cpu.h"

namespace fastok {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Few rows leave threads idle and caches unused: their keys are taken in parts, and the partial results merged. By the
// shape of the sequence alone, so that results do not depend on batch or threads.
constexpr int64_t kFewRows = 16, kSplitKeys = 2048;

// Part of the work: some rows of one head against some of its keys.
struct Task {
  int64_t b, h, row_begin, row_end, split, n_splits;
};

int64_t splits_of(int64_t n_q, int64_t n_k) {
  return n_q > 0 && n_q <= kFewRows ? std::max<int64_t>(1, (n_k + kSplitKeys - 1) / kSplitKeys) : 1;
}

std::vector<Task> tasks_of(const AttentionCall& call, int64_t row_block) {
  std::vector<Task> tasks;
  for (int64_t b = 0; b < call.sequences; ++b) {
    const int64_t n_q = call.n_q(b), blocks = (n_q + row_block - 1) / row_block, splits = splits_of(n_q, call.n_k(b));
    for (int64_t split = 0; split < splits; ++split) {
      for (int64_t h = 0; h < call.heads; ++h) {
        for (int64_t i = 0; i < blocks; ++i) {
          // From both ends in turn: under a causal mask the last rows cost most, and threads take neighbouring tasks.
          const int64_t block = i % 2 == 0 ? i / 2 : blocks - 1 - i / 2;
          tasks.push_back({b, h, block * row_block, std::min(n_q, (block + 1) * row_block), split, splits});
        }
      }
    }
  }
  return tasks;
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, int64_t left, int64_t right,
                                     double softcap, std::optional<Tensor> key_bias, std::optional<Tensor> cu_seqlens_q,
                                     std::optional<Tensor> cu_seqlens_k, int64_t, int64_t) {
  const AttentionCall call(q, k, v, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k);
  const int64_t batch = call.batch(), n_q = call.total_q;
  const Tensor out = call.packed
                         ? empty_like_device(call.q, {n_q, call.heads, call.v_width}, call.q.scalar_type())
                         : empty_like_device(call.q, {batch, n_q, call.heads, call.v_width}, call.q.scalar_type());
  const Tensor lse = call.packed ? empty_like_device(call.q, {call.heads, n_q}, ScalarType::Float)
                                 : empty_like_device(call.q, {batch, call.heads, n_q}, ScalarType::Float);
  char* const outs = static_cast<char*>(out.mutable_data_ptr());
  float* const lses = data<float>(lse);
  const int64_t row_bytes = call.v_width * int64_t(element_size(call.dtype));
  if (call.packed) {
    // Rows before the first and behind the last sequence see nothing.
    const int64_t first = call.q_begin(0), last = call.q_begin(call.sequences);
    std::fill(outs, outs + first * call.heads * row_bytes, 0);
    std::fill(outs + last * call.heads * row_bytes, outs + n_q * call.heads * row_bytes, 0);
    for (int64_t h = 0; h < call.heads; ++h) {
      std::fill(lses + h * n_q, lses + h * n_q + first, -kInfinity);
      std::fill(lses + h * n_q + last, lses + (h + 1) * n_q, -kInfinity);
    }
  }

  const AttentionEngine& engine = call.engine();
  const std::vector<Task> tasks = tasks_of(call, engine.row_block);
  // Partial results, [task][row][value width] and [task][row], of the tasks whose keys are split.
  const bool split = std::any_of(tasks.begin(), tasks.end(), [](const Task& t) { return t.n_splits > 1; });
  std::vector<float> partial(split ? tasks.size() * size_t(kFewRows * call.v_width) : 0);
  std::vector<float> partial_lse(split ? tasks.size() * size_t(kFewRows) : 0);
  const double mean_keys = double(call.packed ? call.total_k / std::max<int64_t>(call.sequences, 1) : call.total_k);
  const int64_t grain =
      1 + int64_t(100e3 / (double(engine.row_block) * mean_keys * double(call.width + call.v_width) + 1));
  torch::stable::parallel_for(0, int64_t(tasks.size()), grain, [&](int64_t begin, int64_t end) {
    const AlignedMemory scratch(engine.scratch_bytes(call.width, call.v_width));
    PackedHead packed(call, engine);
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = tasks[i];
      const AttentionHead head = call.head(t.b, t.h);
      const bool whole = t.n_splits == 1;
      const int64_t key_begin = whole ? 0 : t.split * kSplitKeys;
      const int64_t key_end = whole ? head.k.count : std::min(head.k.count, key_begin + kSplitKeys);
      packed.pack(t.b, t.h / (call.heads / call.groups), head, key_begin, key_end);
      const RowList rows{nullptr, t.row_begin, t.row_end - t.row_begin};
      if (whole) {
        char* const to = outs + (call.row_at(t.b, t.h) + t.row_begin * call.heads) * row_bytes;
        engine.forward(head, packed.keys, packed.values, key_begin, key_end, rows, to, call.heads * call.v_width, false,
                       lses + call.lse_at(t.b, t.h) + t.row_begin, scratch.get());
      } else {
        engine.forward(head, packed.keys, packed.values, key_begin, key_end, rows,
                       partial.data() + i * kFewRows * call.v_width, call.v_width, true,
                       partial_lse.data() + i * kFewRows, scratch.get());
      }
    }
  });

  // Tasks of one head's splits lie `heads` apart.
  for (size_t i = 0; i < tasks.size() && split; ++i) {
    const Task& t = tasks[i];
    if (t.n_splits == 1 || t.split > 0) continue;
    for (int64_t row = 0; row < t.row_end - t.row_begin; ++row) {
      const size_t at = i * kFewRows + size_t(row), apart = size_t(call.heads * kFewRows);
      pick_attention_kernels().merge_parts(partial.data() + at * size_t(call.v_width), int64_t(apart) * call.v_width,
                                           partial_lse.data() + at, int64_t(apart), t.n_splits, call.v_width,
                                           call.dtype, outs + (call.row_at(t.b, t.h) + row * call.heads) * row_bytes,
                                           lses + call.lse_at(t.b, t.h) + row);
    }
  }
  return {out, lse};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("attention", TORCH_BOX(&fastok::attention)); }
