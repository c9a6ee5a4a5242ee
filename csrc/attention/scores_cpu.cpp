// CPU backend of attention_scores: a task holds a block of keys and passes all selected rows over it, so that columns
// are reduced where they are made. And of attention_with_scores, whose tasks do the same, where they can, with the keys
// that they have just attended to. The arithmetic is in attention_simd.cpp.
#include <atomic>
#include <string>
#include <vector>

#include "attention/attention_cpu.h"

namespace fastok {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
// Keys of a task: as many as leave each thread several.
constexpr int64_t kManyKeys = 1024, kFewKeys = 128, kTasksPerThread = 2;

// For up to so many queries, packing the keys costs more than it saves.
constexpr int64_t kFewQueries = 4;

enum class Reduce { sum, max, none };

Reduce reduce_of(const std::string& name) {
  if (name == "sum") return Reduce::sum;
  if (name == "max") return Reduce::max;
  STD_TORCH_CHECK(name == "none", "reduce must be sum, max or none; got ", name);
  return Reduce::none;
}

// The selected rows of one sequence: which, and at which place of the selection.
struct Selection {
  std::vector<int64_t> index, place;  // empty for a slice, whose places are 0, 1, ...
  RowList rows;

  int64_t place_of(int64_t i) const { return place.empty() ? i : place[i]; }
};

Selection select(const int64_t* rows, int64_t n_rows, int64_t begin, int64_t end, int64_t n) {
  Selection s;
  if (!rows) {
    begin = begin < 0 ? std::max<int64_t>(begin + n, 0) : std::min(begin, n);
    end = end < 0 ? std::max<int64_t>(end + n, 0) : std::min(end, n);
    s.rows = {nullptr, begin, std::max<int64_t>(end - begin, 0)};
    return s;
  }
  for (int64_t i = 0; i < n_rows; ++i) {
    if (rows[i] < 0 || rows[i] >= n) continue;  // only packed sequences can be too short
    s.index.push_back(rows[i]);
    s.place.push_back(i);
  }
  s.rows = {s.index.data(), 0, int64_t(s.index.size())};
  return s;
}

struct Job {
  const AttentionCall& call;
  const AttentionEngine& engine;
  const AttentionKernels& kernels;
  std::vector<Selection> selections;
  int64_t group, n_places, col_begin, col_end;
  Reduce reduce;
  bool head_max, logits, over_cols;
  Tensor finished, weights, result;
  const float* lse = nullptr;         // of all rows, [B,H,S]; or nullptr
  std::vector<float> own;             // of the selected rows, [sequence][H][place in the list]
  std::vector<int64_t> at;            // where a sequence's begin
  const float* key_weight = nullptr;  // [B,G,T]; nullptr: none
  float* out;                         // [B, H / group, (places,) columns]

  Job(const AttentionCall& call_in, const std::optional<Tensor>& lse_in, const std::optional<Tensor>& weight_in,
      const std::optional<Tensor>& rows, int64_t row_begin, int64_t row_end, int64_t col_begin_in, int64_t col_end_in,
      bool over_cols_in, const std::string& reduce_name, int64_t head_group, bool head_axis, bool head_max_in,
      bool logits_in)
      : call(call_in),
        engine(call_in.engine()),
        kernels(pick_attention_kernels()),
        group(head_group),
        col_begin(col_begin_in),
        col_end(col_end_in),
        reduce(reduce_of(reduce_name)),
        head_max(head_max_in),
        logits(logits_in),
        over_cols(over_cols_in) {
    STD_TORCH_CHECK(group > 0 && call.heads % group == 0, "head_group must divide the heads, ", call.heads);
    STD_TORCH_CHECK(0 <= col_begin && col_begin <= col_end && col_end <= call.total_k &&
                        (!call.packed || col_end - col_begin == call.total_k),
                    "cols must be within [0, T], and all of them for packed sequences");
    if (lse_in && !over_cols) {
      finished = checked_contiguous(*lse_in, ScalarType::Float, "lse");
      STD_TORCH_CHECK(finished.numel() == call.batch() * call.heads * call.total_q, "lse must be [B,H,S]");
      lse = const_data<float>(finished);
    }
    if (weight_in) {
      weights = checked_contiguous(*weight_in, ScalarType::Float, "key_weight");
      STD_TORCH_CHECK(weights.numel() == call.batch() * call.groups * call.total_k, "key_weight must be [B,G,T]");
      key_weight = const_data<float>(weights);
    }
    Tensor row_index;
    if (rows) row_index = checked_contiguous(*rows, ScalarType::Long, "rows");
    n_places = rows ? row_index.numel() : row_end - row_begin;
    if (!rows && (row_begin < 0) != (row_end < 0)) n_places = row_begin < 0 ? -row_begin : int64_t(1) << 31;
    STD_TORCH_CHECK(reduce != Reduce::none || n_places < int64_t(1) << 30,
                    "rows must be a known number for reduce=none");
    n_places = reduce == Reduce::none ? std::max<int64_t>(n_places, 0) : 1;
    for (int64_t b = 0; b < call.sequences; ++b)
      selections.push_back(select(rows ? const_data<int64_t>(row_index) : nullptr, rows ? row_index.numel() : 0,
                                  row_begin, row_end, call.n_q(b)));

    std::vector<int64_t> shape;
    if (!call.packed) shape.push_back(call.sequences);
    if (head_axis) shape.push_back(call.heads / group);
    if (reduce == Reduce::none) shape.push_back(n_places);
    shape.push_back(col_end - col_begin);
    result = torch::stable::empty(shape, ScalarType::Float, std::nullopt, call.q.device());
    out = data<float>(result);
    // What no row of a sequence reaches.
    std::fill_n(out, result.numel(), logits && reduce != Reduce::sum ? -kInfinity : 0.0f);
  }

  int64_t n_cols(int64_t b) const { return call.packed ? call.n_k(b) : col_end - col_begin; }
  int64_t first_col() const { return call.packed ? 0 : col_begin; }
  bool one_by_one() const { return group == 1 && !key_weight; }
  // Heads can be reduced one after the other.
  bool heads_commute() const {
    return reduce == Reduce::sum ? !head_max || group == 1 : reduce == Reduce::max && one_by_one();
  }

  bool few_queries(int64_t b) const { return call.n_q(b) <= kFewQueries; }
  bool sums_probabilities() const { return reduce == Reduce::sum && !logits; }
  float nothing() const { return reduce == Reduce::max && logits ? -kInfinity : 0.0f; }

  // Of each key of the head's sequence.
  const float* weight_of(int64_t b, int64_t h) const {
    return key_weight + call.key_at(b, h / (call.heads / call.groups), call.groups);
  }

  const float* lse_of(int64_t b, int64_t h, const RowList& rows, int64_t first, float* gathered) const {
    if (logits) return nullptr;
    const float* const of_head =
        lse ? lse + call.lse_at(b, h) : own.data() + at[b] + h * selections[b].rows.count + first;
    for (int64_t i = 0; i < rows.count; ++i) gathered[i] = of_head[lse ? rows.at(i) : i];
    return gathered;
  }
};

bool any_sees(const AttentionHead& head, const RowList& rows, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < rows.count; ++i)
    if (head.first_key(rows.at(i)) < end && head.last_key(rows.at(i)) > begin) return true;
  return false;
}

// One head's columns [begin, end), weighted, to those of its group. The first head of a group finds zeros there.
void add_head(const Job& job, int64_t b, int64_t h, const float* of_head, int64_t begin, int64_t end, float* total) {
  const float* const weight = job.key_weight ? job.weight_of(b, h) + begin : nullptr;
  if (job.one_by_one()) {
    std::copy_n(of_head, end - begin, total);
  } else {
    for (int64_t j = 0; j < end - begin; ++j) total[j] += weight ? of_head[j] * weight[j] : of_head[j];
  }
}

// One block of keys [begin, end) of one output head.
class Block {
 public:
  Block(const Job& job, int64_t b, int64_t o, int64_t begin, int64_t end)
      : job_(job),
        b_(b),
        o_(o),
        begin_(begin),
        end_(end),
        pitch_((end - begin + job.engine.key_step - 1) / job.engine.key_step * job.engine.key_step),
        scratch_(job.engine.scratch_bytes(job.call.width, 0)),
        scores_(std::make_unique<AlignedMemory>(block_bytes())),
        total_(size_t(pitch_), job.nothing()) {}

  void run() {
    if (job_.heads_commute()) {
      head_by_head();
    } else {
      row_by_row();
    }
    if (job_.reduce == Reduce::none) return;
    const int64_t n_out = job_.call.heads / job_.group, n_cols = job_.col_end - job_.col_begin;
    const int64_t first = job_.call.packed ? job_.call.k_begin(b_) : -job_.col_begin;
    float* const row = job_.out + ((job_.call.packed ? 0 : b_ * n_out) + o_) * n_cols;
    std::copy_n(total_.begin(), end_ - begin_, row + first + begin_);
  }

 private:
  size_t block_bytes() const { return size_t(job_.engine.row_block * pitch_) * sizeof(float); }
  float* scores() const { return static_cast<float*>(scores_->get()); }

  // Each head's rows first.
  void head_by_head() {
    const RowList& all = job_.selections[b_].rows;
    std::vector<float> lse(job_.engine.row_block), of_head(pitch_);
    for (int64_t h = o_ * job_.group; h < (o_ + 1) * job_.group; ++h) {
      const AttentionHead head = job_.call.head(b_, h);
      std::fill(of_head.begin(), of_head.end(), job_.nothing());
      for (int64_t done = 0; done < all.count; done += job_.engine.row_block) {
        const RowList rows = all.part(done, job_.engine.row_block);
        if (!any_sees(head, rows, begin_, end_)) continue;
        const float* const of_rows = job_.lse_of(b_, h, rows, done, lse.data());
        if (job_.sums_probabilities() && !job_.few_queries(b_)) {
          job_.engine.sum_scores(head, keys_of(h, head, true), begin_, end_, rows, of_rows, of_head.data(),
                                 scratch_.get());
        } else {
          make_scores(head, h, rows, of_rows, true);
          job_.kernels.fold_rows(scores(), rows.count, pitch_, pitch_, job_.reduce == Reduce::max, of_head.data());
        }
      }
      add_head(job_, b_, h, of_head.data(), begin_, end_, total_.data());
    }
  }

  // Each row's heads first.
  void row_by_row() {
    const RowList& all = job_.selections[b_].rows;
    const AlignedMemory combined(block_bytes());
    std::vector<float> lse(job_.engine.row_block), weight(job_.key_weight ? pitch_ : 0);
    for (int64_t done = 0; done < all.count; done += job_.engine.row_block) {
      const RowList rows = all.part(done, job_.engine.row_block);
      for (int64_t h = o_ * job_.group; h < (o_ + 1) * job_.group; ++h) {
        const AttentionHead head = job_.call.head(b_, h);
        make_scores(head, h, rows, job_.lse_of(b_, h, rows, done, lse.data()), false);
        if (job_.key_weight) std::copy_n(job_.weight_of(b_, h) + begin_, end_ - begin_, weight.begin());
        job_.kernels.fold_blocks(scores(), rows.count, pitch_, pitch_, job_.key_weight ? weight.data() : nullptr,
                                 h == o_ * job_.group, job_.head_max, static_cast<float*>(combined.get()));
      }
      const float* const block = static_cast<const float*>(combined.get());
      if (job_.reduce == Reduce::none) {
        for (int64_t i = 0; i < rows.count; ++i) write_row(done + i, block + i * pitch_);
      } else {
        job_.kernels.fold_rows(block, rows.count, pitch_, pitch_, job_.reduce == Reduce::max, total_.data());
      }
    }
  }

  void write_row(int64_t i, const float* row) const {
    const int64_t n_out = job_.call.heads / job_.group, n_cols = job_.col_end - job_.col_begin;
    const int64_t first = job_.call.packed ? job_.call.k_begin(b_) : -job_.col_begin;
    const int64_t place = job_.selections[b_].place_of(i);
    float* const to = job_.out + (((job_.call.packed ? 0 : b_ * n_out) + o_) * job_.n_places + place) * n_cols;
    std::copy_n(row, end_ - begin_, to + first + begin_);
  }

  void make_scores(const AttentionHead& head, int64_t h, const RowList& rows, const float* lse, bool in_turn) {
    if (job_.few_queries(b_)) {
      job_.kernels.few_scores(head, begin_, end_, rows, lse, scores(), pitch_);
    } else {
      job_.engine.scores(head, keys_of(h, head, in_turn), begin_, end_, rows, lse, scores(), pitch_, scratch_.get());
    }
  }

  // The block's packed keys of a head: packed when first asked for, or (`in_turn`) when the KV head changes.
  const void* keys_of(int64_t h, const AttentionHead& head, bool in_turn) {
    const int64_t g = h / (job_.call.heads / job_.call.groups);
    const size_t slot = in_turn ? 0 : size_t(g);
    if (keys_.size() <= slot) keys_.resize(in_turn ? 1 : size_t(job_.call.groups));
    if (!keys_[slot] || (in_turn && g != packed_)) {
      if (!keys_[slot])
        keys_[slot] = std::make_unique<AlignedMemory>(job_.engine.key_bytes(end_ - begin_, head.k.width));
      job_.engine.pack_keys(head.k, job_.call.dtype, begin_, end_, keys_[slot]->get());
      packed_ = g;
    }
    return keys_[slot]->get();
  }

  const Job& job_;
  int64_t b_, o_, begin_, end_, pitch_, packed_ = -1;
  AlignedMemory scratch_;
  std::unique_ptr<AlignedMemory> scores_;
  std::vector<std::unique_ptr<AlignedMemory>> keys_;
  std::vector<float> total_;
};

// The log-sum-exp of the selected rows over keys [begin, end) of each sequence.
void compute_lse(Job& job, int64_t begin, int64_t end) {
  const AttentionCall& call = job.call;
  int64_t total = 0;
  for (int64_t b = 0; b < call.sequences; ++b) {
    job.at.push_back(total);
    total += call.heads * job.selections[b].rows.count;
  }
  job.own.resize(size_t(total));
  torch::stable::parallel_for(0, call.sequences * call.heads, 1, [&](int64_t first, int64_t last) {
    const AlignedMemory scratch(job.engine.scratch_bytes(call.width, 0));
    PackedHead packed(call, job.engine);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / call.heads, h = i % call.heads, stop = std::min(end, call.n_k(b));
      const RowList& rows = job.selections[b].rows;
      if (rows.count == 0) continue;
      const AttentionHead head = call.head(b, h);
      packed.pack(b, h / (call.heads / call.groups), head, begin, stop);
      job.engine.forward(head, packed.keys, nullptr, begin, stop, rows, {}, nullptr, 0, false,
                         job.own.data() + job.at[b] + h * rows.count, scratch.get());
    }
  });
}

// All blocks of keys, once the log-sum-exps are there.
void run_blocks(const Job& job) {
  const AttentionCall& call = job.call;
  const int64_t n_out = call.heads / job.group, n_cols = job.col_end - job.col_begin;
  // A block's size changes no result, so that threads may decide it.
  struct Task {
    int64_t b, o, begin, end;
  };
  std::vector<Task> tasks;
  int64_t most = kManyKeys;
  while (most > kFewKeys && call.sequences * n_out * ((n_cols + most - 1) / most) <
                                kTasksPerThread * int64_t(torch::stable::get_num_threads()))
    most /= 2;
  for (int64_t b = 0; b < call.sequences; ++b) {
    const int64_t n = job.n_cols(b), blocks = (n + most - 1) / most, even = blocks > 0 ? (n + blocks - 1) / blocks : 0;
    const int64_t size = (even + job.engine.key_step - 1) / job.engine.key_step * job.engine.key_step;
    for (int64_t o = 0; o < n_out && job.selections[b].rows.count > 0; ++o)
      for (int64_t j = 0; j < n; j += size)
        tasks.push_back({b, o, job.first_col() + j, job.first_col() + std::min(n, j + size)});
  }
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // From both ends in turn: under a causal mask the first keys cost most, and threads take neighbouring tasks.
      const Task& t = tasks[i % 2 == 0 ? i / 2 : int64_t(tasks.size()) - 1 - i / 2];
      Block(job, t.b, t.o, t.begin, t.end).run();
    }
  });
}

Tensor attention_scores(Tensor q, Tensor k, std::optional<Tensor> lse, std::optional<Tensor> key_weight, double scale,
                        int64_t left, int64_t right, double softcap, std::optional<Tensor> key_bias,
                        std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_k, int64_t, int64_t,
                        std::optional<Tensor> rows, int64_t row_begin, int64_t row_end, int64_t col_begin,
                        int64_t col_end, bool over_cols, std::string reduce, int64_t head_group, bool head_max,
                        bool logits) {
  const AttentionCall call(q, k, std::nullopt, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k);
  Job job(call, lse, key_weight, rows, row_begin, row_end, col_begin, col_end, over_cols, reduce, head_group, true,
          head_max, logits);
  if (!logits && !job.lse) compute_lse(job, over_cols ? col_begin : 0, over_cols ? col_end : call.total_k);
  run_blocks(job);
  return job.result;
}

// ---- attention_with_scores ------------------------------------------------------------------------------------------

// Whether a task of attention can make a head's scores with what it has at hand: the same numbers as a pass of their
// own.
bool fits_attention(const Job& job, bool listed_rows) {
  const AttentionCall& call = job.call;
  if (call.packed || call.sequences == 0 || listed_rows || job.over_cols || call.total_k == 0 ||
      job.col_end - job.col_begin != call.total_k || !job.sums_probabilities() || !job.heads_commute())
    return false;
  const RowList& rows = job.selections[0].rows;
  return rows_fit_one_task(call, rows.first, rows.first + rows.count);
}

std::tuple<Tensor, Tensor> attend_with_scores(const AttentionCall& call, const Job& job) {
  const RowList& all = job.selections[0].rows;
  const int64_t n_keys = call.total_k, step = job.engine.key_step, pitch = (n_keys + step - 1) / step * step;
  const int64_t n_out = call.heads / job.group;
  const AlignedMemory columns(size_t(call.sequences * call.heads * pitch) * sizeof(float));  // of each head
  // Whoever finishes a group's last head adds them up, in their own order.
  std::vector<std::atomic<int64_t>> unfinished(size_t(call.sequences * n_out));
  for (auto& heads : unfinished) heads = job.group;
  const auto columns_of = [&](int64_t b, int64_t h) {
    return static_cast<float*>(columns.get()) + (b * call.heads + h) * pitch;
  };
  const auto finished = [&](int64_t b, int64_t h, const AttentionHead& head, const void* keys, const float* lse,
                            void* scratch) {
    float* const total = columns_of(b, h);
    std::fill_n(total, pitch, 0.0f);
    for (int64_t done = 0; done < all.count; done += job.engine.row_block) {
      const RowList rows = all.part(done, job.engine.row_block);
      if (any_sees(head, rows, 0, n_keys))
        job.engine.sum_scores(head, keys, 0, n_keys, rows, lse + rows.first, total, scratch);
    }
    const int64_t o = b * n_out + h / job.group, first = h / job.group * job.group;
    if (unfinished[o].fetch_sub(1) > 1) return;
    for (int64_t other = first; other < first + job.group; ++other)
      add_head(job, b, other, columns_of(b, other), 0, n_keys, job.out + o * n_keys);
  };
  const RowsTogether together{all.first, all.first + all.count, finished};
  return attend(call, &together);
}

std::tuple<Tensor, Tensor, Tensor> attention_with_scores(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_weight,
                                                         double scale, int64_t left, int64_t right, double softcap,
                                                         std::optional<Tensor> key_bias,
                                                         std::optional<Tensor> cu_seqlens_q,
                                                         std::optional<Tensor> cu_seqlens_k, int64_t, int64_t,
                                                         std::optional<Tensor> rows, int64_t row_begin, int64_t row_end,
                                                         int64_t col_begin, int64_t col_end, bool over_cols,
                                                         std::string reduce, std::string heads, bool logits) {
  const AttentionCall call(q, k, v, scale, left, right, softcap, key_bias, cu_seqlens_q, cu_seqlens_k);
  const AttentionCall of_scores = call.without_values();
  const bool by_group = heads.rfind("group_", 0) == 0, mean = heads == "mean" || heads == "group_mean";
  const int64_t group = heads == "none" ? 1 : by_group ? call.heads / call.groups : call.heads;
  Job job(of_scores, std::nullopt, key_weight, rows, row_begin, row_end, col_begin, col_end, over_cols, reduce, group,
          heads == "none" || by_group, heads == "max", logits);
  Tensor out, lse;
  if (fits_attention(job, rows.has_value())) {
    std::tie(out, lse) = attend_with_scores(call, job);
  } else {
    std::tie(out, lse) = attend(call, nullptr);
    job.lse = over_cols ? nullptr : const_data<float>(lse);
    if (!logits && !job.lse) compute_lse(job, col_begin, col_end);
    run_blocks(job);
  }
  for (int64_t i = 0; mean && i < job.result.numel(); ++i) job.out[i] /= float(group);
  return {out, lse, job.result};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) {
  m.impl("attention_scores", TORCH_BOX(&fastok::attention_scores));
  m.impl("attention_with_scores", TORCH_BOX(&fastok::attention_with_scores));
}
