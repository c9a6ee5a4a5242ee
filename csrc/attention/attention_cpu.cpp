// CPU backend of attention: sharing out heads, rows and, for few rows, keys. The arithmetic is in attention_simd.cpp.
#include <tuple>
#include <vector>

#include "attention/attention_cpu.h"

namespace fastok {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Rows that are taken together to make scores may cost some threads more than others: by up to so many blocks more.
constexpr int64_t kFewBlocks = 2, kHeadsPerThread = 4;
// Few rows leave threads idle and caches unused: their keys are taken in parts, and the partial results merged. Fewer
// still are bound by reading their keys: these are not packed, but read where they lie, once for all query heads that
// share them. By the shape of the sequence alone, so that results do not depend on batch or threads.
constexpr int64_t kFewRows = 16, kSplitKeys = 2048, kInPlaceRows = 4, kInPlaceSplitKeys = 512;

// Part of the work: some rows of some heads, which share a KV head, against the keys [key_begin, key_end).
struct Task {
  int64_t b, h, n_heads, row_begin, row_end, key_begin, key_end;
  int64_t n_splits, step;  // step: tasks from one part of the keys to the next
  bool in_place;

  int64_t n_rows() const { return row_end - row_begin; }
  bool partial() const { return in_place || n_splits > 1; }
};

// Query heads of one KV head that read its keys together.
int64_t heads_together(const AttentionCall& call, int64_t n_q) {
  const int64_t group = call.heads / call.groups,
                most = pick_attention_kernels().decode_rows / std::max<int64_t>(n_q, 1);
  const int64_t parts = (group + most - 1) / most;
  return (group + parts - 1) / parts;
}

std::vector<Task> tasks_of(const AttentionCall& call, int64_t row_block, int64_t together_begin, int64_t together_end) {
  std::vector<Task> tasks;
  for (int64_t b = 0; b < call.sequences; ++b) {
    const int64_t n_q = call.n_q(b), n_k = call.n_k(b);
    if (n_q > 0 && n_q <= kFewRows) {
      const bool in_place = n_q <= kInPlaceRows;
      const int64_t group = call.heads / call.groups, together = in_place ? heads_together(call, n_q) : 1;
      const int64_t step = call.groups * ((group + together - 1) / together);
      const int64_t size = in_place ? kInPlaceSplitKeys : kSplitKeys;
      const int64_t splits = std::max<int64_t>(1, (n_k + size - 1) / size);
      for (int64_t s = 0; s < splits; ++s)
        for (int64_t g = 0; g < call.groups; ++g)
          for (int64_t h = 0; h < group; h += together)
            tasks.push_back({b, g * group + h, std::min(together, group - h), 0, n_q, s * size,
                             std::min(n_k, (s + 1) * size), splits, step, in_place});
      continue;
    }
    // Blocks of rows, those that hold rows of [together_begin, together_end) as one.
    std::vector<int64_t> starts;
    for (int64_t row = 0; row < n_q; row += row_block)
      if (row <= together_begin || row >= together_end) starts.push_back(row);
    starts.push_back(n_q);
    const int64_t blocks = int64_t(starts.size()) - 1;
    for (int64_t h = 0; h < call.heads; ++h) {
      for (int64_t i = 0; i < blocks; ++i) {
        // From both ends in turn: under a causal mask the last rows cost most, and threads take neighbouring tasks.
        const int64_t block = i % 2 == 0 ? i / 2 : blocks - 1 - i / 2;
        tasks.push_back({b, h, 1, starts[block], starts[block + 1], 0, n_k, 1, 1, false});
      }
    }
  }
  return tasks;
}

// Partial results, which follow each other: [head][row][v width] and [head][row] of each task.
struct Partial {
  std::vector<int64_t> at;  // rows before each task's
  std::vector<float> out, lse;

  Partial(const std::vector<Task>& tasks, int64_t v_width) {
    int64_t rows = 0;
    for (const Task& t : tasks) {
      at.push_back(rows);
      if (t.partial()) rows += t.n_heads * t.n_rows();
    }
    out.resize(size_t(rows * v_width));
    lse.resize(size_t(rows));
  }
};

// What a thread's next tasks will read: queries of the very next one, and keys and values shared out among the tasks
// before the first that needs them.
class Foresight {
 public:
  Foresight(const AttentionCall& call, const std::vector<Task>& tasks, int64_t end)
      : call_(call), tasks_(tasks), end_(end) {}

  Upcoming behind(int64_t i) {
    Upcoming upcoming = {};
    if (i + 1 < end_) {
      const Task& next = tasks_[i + 1];
      upcoming.part[0] = {call_.head(next.b, next.h).q, next.row_begin, next.row_end};
    }
    if (i >= change_) {
      since_ = i;
      for (change_ = i + 1; change_ < end_ && same_keys(tasks_[i], tasks_[change_]);) ++change_;
    }
    if (change_ < end_) {
      const Task& next = tasks_[change_];
      const AttentionHead head = call_.head(next.b, next.h);
      const int64_t n = next.key_end - next.key_begin, tasks = change_ - since_;
      const int64_t begin = next.key_begin + n * (i - since_) / tasks;
      const int64_t end = next.key_begin + n * (i - since_ + 1) / tasks;
      upcoming.part[1] = {head.k, begin, end};
      if (call_.has_values) upcoming.part[2] = {head.v, begin, end};
    }
    return upcoming;
  }

 private:
  bool same_keys(const Task& a, const Task& b) const {
    const int64_t group = call_.heads / call_.groups;
    return a.b == b.b && a.h / group == b.h / group && a.key_begin == b.key_begin && a.key_end == b.key_end;
  }

  const AttentionCall& call_;
  const std::vector<Task>& tasks_;
  const int64_t end_;
  int64_t since_ = 0, change_ = 0;  // the tasks around the last one that have its keys
};

}  // namespace

bool rows_fit_one_task(const AttentionCall& call, int64_t begin, int64_t end) {
  const int64_t block = call.engine().row_block, heads = call.sequences * call.heads;
  if (call.packed || call.total_q <= kFewRows || begin >= end) return false;
  return (end - 1) / block - begin / block < kFewBlocks || heads >= kHeadsPerThread * torch::stable::get_num_threads();
}

std::tuple<Tensor, Tensor> attend(const AttentionCall& call, const RowsTogether* together) {
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

  const AttentionKernels& kernels = pick_attention_kernels();
  const AttentionEngine& engine = call.engine();
  const std::vector<Task> tasks =
      tasks_of(call, engine.row_block, together ? together->begin : 0, together ? together->end : 0);
  Partial partial(tasks, call.v_width);
  double work = 0;
  for (const Task& t : tasks) work += double(t.n_heads * t.n_rows()) * double(t.key_end - t.key_begin);
  work *= double(call.width + call.v_width) / double(std::max<size_t>(tasks.size(), 1));
  const size_t scratch_bytes = std::max(engine.scratch_bytes(call.width, call.v_width), kernels.decode_scratch_bytes);
  const int64_t n_tasks = int64_t(tasks.size()), grain = 1 + int64_t(100e3 / (work + 1));
  torch::stable::parallel_for(0, n_tasks, grain, [&](int64_t begin, int64_t end) {
    const AlignedMemory scratch(scratch_bytes);
    PackedHead packed(call, engine);
    std::vector<AttentionHead> heads;
    Foresight foresight(call, tasks, end);
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = tasks[i];
      const AttentionHead head = call.head(t.b, t.h);
      float* const part = partial.out.data() + partial.at[i] * call.v_width;
      float* const part_lse = partial.lse.data() + partial.at[i];
      if (t.in_place) {
        heads.clear();
        for (int64_t h = 0; h < t.n_heads; ++h) heads.push_back(call.head(t.b, t.h + h));
        kernels.decode(heads.data(), t.n_heads, t.key_begin, t.key_end, part, part_lse, scratch.get());
        continue;
      }
      packed.pack(t.b, t.h / (call.heads / call.groups), head, t.key_begin, t.key_end);
      const RowList rows{nullptr, t.row_begin, t.n_rows()};
      const Upcoming upcoming = foresight.behind(i);
      if (t.partial()) {
        engine.forward(head, packed.keys, packed.values, t.key_begin, t.key_end, rows, upcoming, part, call.v_width,
                       true, part_lse, scratch.get());
      } else {
        char* const to = outs + (call.row_at(t.b, t.h) + t.row_begin * call.heads) * row_bytes;
        float* const lse = lses + call.lse_at(t.b, t.h);
        engine.forward(head, packed.keys, packed.values, t.key_begin, t.key_end, rows, upcoming, to,
                       call.heads * call.v_width, false, lse + t.row_begin, scratch.get());
        if (together && t.row_begin < together->end && t.row_end > together->begin)
          together->finished(t.b, t.h, head, packed.keys, lse, scratch.get());
      }
    }
  });

  torch::stable::parallel_for(0, partial.lse.empty() ? 0 : n_tasks, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& t = tasks[i];
      if (!t.partial() || t.key_begin > 0) continue;
      const int64_t n_rows = t.n_rows(), rows = t.n_heads * n_rows;
      const int64_t apart = t.n_splits > 1 ? partial.at[i + t.step] - partial.at[i] : rows;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t h = t.h + row / n_rows, at = partial.at[i] + row;
        kernels.merge_parts(partial.out.data() + at * call.v_width, apart * call.v_width, partial.lse.data() + at,
                            apart, t.n_splits, call.v_width, call.dtype,
                            outs + (call.row_at(t.b, h) + row % n_rows * call.heads) * row_bytes,
                            lses + call.lse_at(t.b, h) + row % n_rows);
      }
    }
  });
  return {out, lse};
}

namespace {

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, double scale, int64_t left, int64_t right,
                                     double softcap, std::optional<Tensor> key_bias, std::optional<Tensor> cu_seqlens_q,
                                     std::optional<Tensor> cu_seqlens_k, int64_t, int64_t) {
  return attend({q, k, v, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k}, nullptr);
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("attention", TORCH_BOX(&fastok::attention)); }
