// CPU backend of decode attention: sharing out heads and keys, merging. The arithmetic is in decode_simd.cpp.
#include "decode/decode_cpu.h"

#include <atomic>
#include <memory>
#include <numeric>

#include "decode/decode.h"
#include "decode/token_lists.h"
#include "quantize/cache_cpu.h"

namespace fastok {
namespace {

// Keys that one task takes; fixed, so that results depend on neither batch nor threads.
constexpr int64_t kSplitKeys = 2048;

// What all caches have in common: queries, what they may see, results.
struct DecodeCall {
  Tensor q, bias;
  TokenLists lists;
  Dtype dtype;
  int64_t batch, rows, heads, width, groups, v_width, units, bias_places = 0;
  bool per_head_bias = false, has_bias;
  float scale, softcap;

  DecodeCall(const Tensor& q_in, int64_t groups_in, int64_t v_width_in, double scale_in, double softcap_in,
             const std::optional<Tensor>& key_bias, const std::optional<Tensor>& tokens)
      : q(with_dense_rows(q_in)),
        dtype(dtype_of(q_in, "q")),
        groups(groups_in),
        v_width(v_width_in),
        has_bias(key_bias.has_value()),
        scale(float(scale_in)),
        softcap(float(softcap_in)) {
    STD_TORCH_CHECK(q.dim() == 4, "q must be [B,S,H,D]");
    batch = q.size(0), rows = q.size(1), heads = q.size(2), width = q.size(3);
    STD_TORCH_CHECK(rows <= 16 && width <= 256 && width % 8 == 0, "q must be [B,S<=16,H,D] with D a multiple of 8");
    STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "the cache's heads must divide those of q");
    units = groups;
    if (has_bias) {
      bias = checked_contiguous(*key_bias, ScalarType::Float, "key_bias");
      per_head_bias = bias.dim() == 3;
      STD_TORCH_CHECK(
          (per_head_bias || bias.dim() == 2) && bias.size(0) == batch && (!per_head_bias || bias.size(1) == heads),
          "key_bias must be [B,T] or [B,H,T]");
      bias_places = bias.size(bias.dim() - 1);
    }
    if (!tokens) return;
    STD_TORCH_CHECK(
        tokens->dim() == 3 && tokens->size(0) == batch && (tokens->size(1) == groups || tokens->size(1) == heads),
        "tokens must be [B,G,K] or [B,H,K]");
    units = tokens->size(1);  // places listed for each query head make units of single heads
    lists = TokenLists(*tokens);
  }

  int64_t ratio() const { return heads / units; }
  int64_t unit_rows() const { return ratio() * rows; }
  int64_t group_of(int64_t unit) const { return unit / (units / groups); }
  void check_bias(int64_t length) const {
    STD_TORCH_CHECK(!has_bias || bias_places >= length, "key_bias must have at least ", length, " places, got ",
                    bias_places);
  }
  const float* bias_of(int64_t b, int64_t h) const {
    return has_bias ? const_data<float>(bias) + (per_head_bias ? b * heads + h : b) * bias_places : nullptr;
  }
  // The list of a unit, nullptr: all places.
  const int32_t* list_of(int64_t b, int64_t unit, int64_t length, int64_t& count) const {
    count = 0;
    return lists.empty() ? nullptr : lists.of(b, unit, length, count);
  }
};

struct UnitTask {
  int64_t b, unit, split, n_splits;
};

// Partial results that are worth a thread to merge.
constexpr int64_t kPartsAtOnce = 64;
// Query rows that a task takes on at most, if they are of several units: they have to stay in the caches.
constexpr int64_t kRowsTogether = 64;

// Units whose keys a task reads side by side, without any effect on what comes out: several if that is how they lie in
// memory, but not so many that threads are left idle.
int64_t units_together(const DecodeCall& call, bool side_by_side, int64_t tasks) {
  if (!side_by_side) return 1;
  int64_t most = std::clamp<int64_t>(kRowsTogether / std::max<int64_t>(call.unit_rows(), 1), 1, call.units);
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  while (most > 1 && tasks < wanted * most) most = (most + 1) / 2;
  const int64_t parts = (call.units + most - 1) / most;
  return (call.units + parts - 1) / parts;
}

// The units of a task, which share a split of a sequence: their queries, and what was found so far.
struct UnitStates {
  const DecodeCall& call;
  int64_t count = 0;
  std::vector<int64_t> unit;
  std::vector<DecodeRows> rows;
  std::vector<DecodeState> state;

  UnitStates(const DecodeCall& call_in, int64_t most)
      : call(call_in),
        unit(size_t(most)),
        rows(size_t(most)),
        state(size_t(most)),
        pitch_(decode_pitch(call.width)),
        v_pitch_(decode_pitch(call.v_width)),
        memory_(size_t(most * call.unit_rows() * (pitch_ + v_pitch_ + 2)) * sizeof(float)),
        last_(size_t(most * call.unit_rows())),
        bias_(size_t(most * call.unit_rows())) {}

  // Another unit; its queries are still to be written.
  float* add(const UnitTask& t, int64_t length) {
    const int64_t n = call.unit_rows(), i = count++;
    float* const q = static_cast<float*>(memory_.get()) + i * n * (pitch_ + v_pitch_ + 2);
    unit[size_t(i)] = t.unit;
    state[size_t(i)] = {q + n * pitch_, q + n * (pitch_ + v_pitch_), q + n * (pitch_ + v_pitch_ + 1)};
    int64_t* const last = last_.data() + i * n;
    const float** const bias = bias_.data() + i * n;
    for (int64_t r = 0; r < n; ++r) {
      last[r] = length - call.rows + r % call.rows;
      bias[r] = call.bias_of(t.b, t.unit * call.ratio() + r / call.rows);
    }
    std::fill_n(state[size_t(i)].sum, n * v_pitch_, 0.0f);
    std::fill_n(state[size_t(i)].peak, n, -std::numeric_limits<float>::infinity());
    std::fill_n(state[size_t(i)].total, n, 0.0f);
    rows[size_t(i)] = {n, q, last, call.has_bias ? bias : nullptr, call.softcap};
    return q;
  }

 private:
  int64_t pitch_, v_pitch_;
  AlignedMemory memory_;
  std::vector<int64_t> last_;
  std::vector<const float*> bias_;
};

// `run` adds the keys of a split to the states of units that are read side by side, if that is wanted; `sides_of` says
// in which basis the queries and the sums are.
template <class Splits, class Length, class Run, class Sides>
std::tuple<Tensor, Tensor> decode_over(const DecodeCall& call, bool side_by_side, const Splits& splits_of,
                                       const Length& length_of, const Run& run, const Sides& sides_of) {
  const Tensor out = empty_like_device(call.q, {call.batch, call.rows, call.heads, call.v_width}, call.q.scalar_type());
  const Tensor lse = empty_like_device(call.q, {call.batch, call.heads, call.rows}, ScalarType::Float);
  std::vector<UnitTask> tasks;
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t unit = 0; unit < call.units; ++unit) {
      call.check_bias(length_of(b, call.group_of(unit)));
      const int64_t n = splits_of(b, unit);
      for (int64_t split = 0; split < n; ++split) tasks.push_back({b, unit, split, n});
    }
  }
  // All heads of some tokens, then the next tokens: in caches [B,T,G,D] they share pages of memory.
  std::vector<size_t> order(tasks.size());
  std::iota(order.begin(), order.end(), size_t(0));
  const auto split_of = [&](size_t i) { return std::pair(tasks[i].b, tasks[i].split); };
  const auto same_keys = [&](size_t i, size_t j) {
    return split_of(i) == split_of(j) &&
           length_of(tasks[i].b, call.group_of(tasks[i].unit)) == length_of(tasks[j].b, call.group_of(tasks[j].unit));
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) { return split_of(x) < split_of(y); });
  const int64_t together = units_together(call, side_by_side, int64_t(tasks.size()));
  std::vector<size_t> begins;  // of what is done together, in that order
  for (size_t i = 0; i < order.size(); ++i) {
    const bool more = i > 0 && same_keys(order[i], order[i - 1]) && int64_t(i - begins.back()) < together;
    if (!more) begins.push_back(i);
  }
  begins.push_back(order.size());
  const int64_t unit_rows = call.unit_rows(), element = int64_t(element_size(call.dtype));
  const auto partial = std::make_unique_for_overwrite<float[]>(tasks.size() * size_t(unit_rows * call.v_width));
  const auto partial_lse = std::make_unique_for_overwrite<float[]>(tasks.size() * size_t(unit_rows));
  const DecodeKernels& kernels = pick_decode_kernels();
  const AttentionKernels& attention = pick_attention_kernels();
  std::atomic<size_t> taken{0};  // by whoever is free: splits differ in length
  torch::stable::parallel_for(0, int64_t(begins.size()) - 1, 1, [&](int64_t, int64_t) {
    UnitStates states(call, together);
    const AlignedMemory scratch(kernels.scratch_bytes(together * unit_rows, std::max(call.width, call.v_width)));
    for (size_t part = taken++; part + 1 < begins.size(); part = taken++) {
      const UnitTask& first = tasks[order[begins[part]]];
      const KvSide *key_side = nullptr, *value_side = nullptr;
      KvChannels key_channels{}, value_channels{};
      states.count = 0;
      for (size_t i = begins[part]; i < begins[part + 1]; ++i) {
        const UnitTask& t = tasks[order[i]];
        const int64_t g = call.group_of(t.unit);
        sides_of(t.b, g, t.split, key_side, key_channels, value_side, value_channels);
        float* const q = states.add(t, length_of(t.b, g));
        for (int64_t r = 0; r < unit_rows; ++r) {
          const int64_t h = t.unit * call.ratio() + r / call.rows, row = r % call.rows;
          const int64_t at = t.b * call.q.stride(0) + row * call.q.stride(1) + h * call.q.stride(2);
          kernels.prepare(static_cast<const char*>(call.q.const_data_ptr()) + at * element, call.dtype, call.width,
                          call.scale, key_side, key_channels, q + r * decode_pitch(call.width));
        }
      }
      run(first.b, first.split, states, scratch.get());
      for (size_t i = begins[part]; i < begins[part + 1]; ++i)
        kernels.finish(states.state[i - begins[part]], unit_rows, call.v_width, value_side, value_channels,
                       partial.get() + order[i] * size_t(unit_rows * call.v_width),
                       partial_lse.get() + order[i] * size_t(unit_rows));
    }
  });
  const int64_t n_rows = call.batch * call.heads * call.rows, n_parts = int64_t(tasks.size()) * unit_rows;
  const int64_t at_once = std::max<int64_t>(kPartsAtOnce * n_rows / std::max<int64_t>(n_parts, 1), 1);
  torch::stable::parallel_for(0, n_rows, at_once, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % call.rows, h = i / call.rows % call.heads, b = i / call.rows / call.heads;
      const int64_t unit = h / call.ratio(), r = h % call.ratio() * call.rows + row;
      const auto task = std::lower_bound(tasks.begin(), tasks.end(), std::pair(b, unit),
                                         [](const UnitTask& t, auto of) { return std::pair(t.b, t.unit) < of; });
      const int64_t first = task - tasks.begin();
      const bool some = task != tasks.end() && task->b == b && task->unit == unit;
      char* const to = static_cast<char*>(out.mutable_data_ptr()) +
                       ((b * call.rows + row) * call.heads + h) * call.v_width * element;
      attention.merge_parts(partial.get() + (first * unit_rows + r) * call.v_width, unit_rows * call.v_width,
                            partial_lse.get() + first * unit_rows + r, unit_rows, some ? task->n_splits : 0,
                            call.v_width, call.dtype, to, data<float>(lse) + (b * call.heads + h) * call.rows + row);
    }
  });
  return {out, lse};
}

int64_t parts_of(int64_t keys) { return (keys + kSplitKeys - 1) / kSplitKeys; }

// Stretches are so many rows longer than equal ones would be, at the cost of the last: those that lie whole pages apart
// come to their next pages together, and wait for all of them.
constexpr int64_t kSkew = 21;

// Places that take part: `count` from `first` on, or of a list.
struct Places {
  const int32_t* listed;
  int64_t first, count;

  int32_t operator[](int64_t i) const { return listed ? listed[i] : int32_t(first + i); }
};

// Rows of keys and values, evenly spaced. Called for `n` of them from place `first` on.
struct EvenRows {
  const char *key, *value;
  int64_t key_stride, value_stride;

  void operator()(int64_t first, int64_t n, const void** keys, const void** values) const {
    const char *k = key + first * key_stride, *v = value + first * value_stride;
    for (int64_t i = 0; i < n; ++i, k += key_stride, v += value_stride) keys[i] = k, values[i] = v;
  }
};

// Those places as rows in memory in the order of reading: in one stretch, or from places far apart, then from those
// behind them.
struct RowPointers {
  std::unique_ptr<const void*[]> row;
  std::unique_ptr<int32_t[]> place;
  int64_t count, stretches = reads_one_stream() ? 1 : kMostStretches;

  // `rows_of` as EvenRows is called. `fetch` is called with the first keys' rows before the others are found.
  template <class Rows, class Fetch>
  RowPointers(const Places& places, const Rows& rows_of, const Fetch& fetch)
      : count(std::max<int64_t>(places.count, 0)) {
    place = std::make_unique_for_overwrite<int32_t[]>(size_t(count));
    row = std::make_unique_for_overwrite<const void*[]>(size_t(2 * count + kRowsAhead));
    const int64_t stretch = (count + stretches - 1) / stretches + kSkew;
    int32_t* next = place.get();
    if (stretches == 1) {
      for (int64_t i = 0; i < count; ++i) next[i] = places[i];
    } else {
      for (int64_t i = 0; i < stretch; ++i)
        for (int64_t j = i; j < count; j += stretch) *next++ = places[j];
    }
    const bool in_a_row = stretches == 1 && !places.listed;
    for (int64_t begin = 0; begin < count; begin += kDecodeBlock) {
      const int64_t block = std::min(kDecodeBlock, count - begin);
      const void **const keys = row.get() + 2 * begin, **const values = keys + block;
      const int64_t at_once = in_a_row ? block : 1;
      for (int64_t i = 0; i < block; i += at_once) rows_of(place[begin + i], at_once, keys + i, values + i);
      if (begin == 0) fetch(keys, block);
    }
    if (count > 0) std::fill_n(row.get() + 2 * count, kRowsAhead, row[size_t(2 * count - 1)]);
  }
  DenseKeys keys(const DecodeCall& call) const {
    return {call.dtype, row.get(), place.get(), count, call.width, call.v_width, stretches};
  }
};

// The first keys of a split, which are read before any are fetched ahead; of all heads, but no more than suit the
// first-level cache.
class FirstKeys {
 public:
  FirstKeys(const DecodeCall& call, const std::vector<DenseHead>& heads)
      : heads_(heads), element_(int64_t(element_size(call.dtype))), bytes_(call.width * element_) {}
  void operator()(const void* const* row, int64_t n) const {
    const int64_t most = kFetchedBytes / (bytes_ * int64_t(heads_.size()));
    for (int64_t i = 0; i < std::min(n, most); ++i)
      for (const DenseHead& head : heads_)
        for (int64_t at = 0; at < bytes_; at += 64)
          __builtin_prefetch(static_cast<const char*>(row[i]) + head.k_at * element_ + at, 0, 0);
  }

 private:
  static constexpr int64_t kFetchedBytes = 16 << 10;
  const std::vector<DenseHead>& heads_;
  int64_t element_, bytes_;
};

// Tokens of x[blocks,tokens,G,*], in bytes.
struct TokenRows {
  const char* base;
  int64_t block, token, head;

  TokenRows(const Tensor& x, int64_t element)
      : base(static_cast<const char*>(x.const_data_ptr())),
        block(x.stride(0) * element),
        token(x.stride(1) * element),
        head(x.stride(2) * element) {}
  const char* at(int64_t b, int64_t t, int64_t g) const { return base + b * block + t * token + g * head; }
};

}  // namespace

std::tuple<Tensor, Tensor> decode(Tensor q, Tensor k, Tensor v, std::optional<Tensor> seq_lens,
                                  std::optional<Tensor> block_table, double scale, double softcap,
                                  std::optional<Tensor> key_bias, std::optional<Tensor> tokens) {
  k = with_dense_rows(k);
  v = with_dense_rows(v);
  STD_TORCH_CHECK(
      k.dim() == 4 && v.dim() == 4 && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
      "k and v must be [B,T,G,D] or [pages,P,G,D] in the dtype of q");
  for (int64_t d = 0; d < 3; ++d) STD_TORCH_CHECK(v.size(d) == k.size(d), "v must go with k");
  STD_TORCH_CHECK(k.size(3) == q.size(q.dim() - 1) && v.size(3) <= 256 && v.size(3) % 8 == 0,
                  "k must have the head dim of q, and v a multiple of 8");
  const DecodeCall call(q, k.size(2), v.size(3), scale, softcap, key_bias, tokens);
  const int64_t page = k.size(1), blocks = k.size(0), element = int64_t(element_size(call.dtype));
  Tensor table;
  int64_t total = page;
  if (block_table) {
    STD_TORCH_CHECK(block_table->dim() == 2 && block_table->size(0) == call.batch, "block_table must be [B,n]");
    table = torch::stable::to(*block_table, ScalarType::Int);
    table = torch::stable::contiguous(table);
    total = table.size(1) * page;
  } else {
    STD_TORCH_CHECK(blocks == call.batch, "k must have the batch size of q");
  }
  std::vector<int64_t> lengths(size_t(call.batch * call.groups), total);
  if (seq_lens) {
    const bool per_head = seq_lens->dim() == 2;
    const Tensor lens = torch::stable::contiguous(torch::stable::to(*seq_lens, ScalarType::Long));
    STD_TORCH_CHECK(lens.numel() == call.batch * (per_head ? call.groups : 1), "seq_lens must be [B] or [B,G]");
    for (int64_t i = 0; i < call.batch * call.groups; ++i) {
      lengths[size_t(i)] = const_data<int64_t>(lens)[per_head ? i : i / call.groups];
      STD_TORCH_CHECK(lengths[size_t(i)] >= 0 && lengths[size_t(i)] <= total, "seq_lens must be within [0, ", total,
                      "], got ", lengths[size_t(i)]);
    }
  }
  const auto length_of = [&](int64_t b, int64_t g) { return lengths[size_t(b * call.groups + g)]; };
  const int32_t* const blocks_of = block_table ? const_data<int32_t>(table) : nullptr;
  for (int64_t b = 0; b < call.batch && blocks_of; ++b) {
    int64_t longest = 0;
    for (int64_t g = 0; g < call.groups; ++g) longest = std::max(longest, length_of(b, g));
    for (int64_t i = 0; i * page < longest; ++i) {
      const int64_t block = blocks_of[b * table.size(1) + i];
      STD_TORCH_CHECK(block >= 0 && block < blocks, "block_table must be within [0, ", blocks, "), got ", block);
    }
  }
  const TokenRows k_rows(k, element), v_rows(v, element);
  const DecodeKernels& kernels = pick_decode_kernels();
  const auto run = [&](int64_t b, int64_t split, const UnitStates& states, void* scratch) {
    const int64_t first_group = call.group_of(states.unit[0]), begin = split * kSplitKeys;
    const char *const k_base = k_rows.at(b, 0, first_group), *const v_base = v_rows.at(b, 0, first_group);
    const EvenRows even{k_base, v_base, k_rows.token, v_rows.token};
    const auto paged = [&](int64_t first, int64_t n, const void** keys, const void** values) {
      for (int64_t i = 0, count; i < n; i += count) {
        const int64_t block = blocks_of[b * table.size(1) + (first + i) / page], begin_at = (first + i) % page;
        count = std::min(n - i, page - begin_at);
        const EvenRows rows{k_rows.at(block, 0, first_group), v_rows.at(block, 0, first_group), k_rows.token,
                            v_rows.token};
        rows(begin_at, count, keys + i, values + i);
      }
    };
    int64_t n_listed;
    const int64_t length = length_of(b, first_group);
    const int32_t* const listed = call.list_of(b, states.unit[0], length, n_listed);
    std::vector<DenseHead> heads;
    for (int64_t i = 0; i < states.count; ++i) {
      const int64_t further = call.group_of(states.unit[size_t(i)]) - first_group;
      heads.push_back({states.rows[size_t(i)], states.state[size_t(i)], further * k.stride(2), further * v.stride(2)});
    }
    const auto attend = [&](const auto& rows_of) {
      const int64_t n = std::min((listed ? n_listed : length) - begin, kSplitKeys);
      const RowPointers pointers({listed ? listed + begin : nullptr, begin, n}, rows_of, FirstKeys(call, heads));
      kernels.dense(heads.data(), states.count, pointers.keys(call), scratch);
    };
    blocks_of ? attend(paged) : attend(even);
  };
  // As many keys to a split whether they are listed or not: a list of all gives the same bits as none.
  const auto splits_of = [&](int64_t b, int64_t unit) {
    int64_t n_listed;
    const int64_t length = length_of(b, call.group_of(unit));
    return parts_of(call.list_of(b, unit, length, n_listed) ? n_listed : length);
  };
  // Heads whose tokens lie side by side, unless each has tokens of its own listed.
  const bool side_by_side = !tokens && k.stride(2) < k.stride(1) && v.stride(2) < v.stride(1);
  return decode_over(call, side_by_side, splits_of, length_of, run,
                     [](int64_t, int64_t, int64_t, const KvSide*&, KvChannels&, const KvSide*&, KvChannels&) {});
}

namespace {

std::tuple<Tensor, Tensor> decode_packed(Tensor q, Tensor data_in, Tensor offset, Tensor counts,
                                         std::optional<Tensor> classes, std::optional<Tensor> key_channels,
                                         std::optional<Tensor> value_channels, Tensor hot_k, Tensor hot_v,
                                         Tensor hot_len, std::vector<int64_t> ints, double scale, double softcap,
                                         std::optional<Tensor> key_bias, std::optional<Tensor> tokens) {
  const PackedCall cache(data_in, offset, counts, classes, key_channels, value_channels, hot_k, hot_v, hot_len, ints);
  const DecodeCall call(q, cache.groups, cache.width, scale, softcap, key_bias, tokens);
  STD_TORCH_CHECK(call.batch == cache.batch && call.width == cache.width && call.dtype == cache.dtype,
                  "q must have the batch size, the head dim and the dtype of the cache");
  // Splits of whole pages first, then those of the hot tokens.
  const int64_t pages_each = kSplitKeys / cache.fmt.page, page_splits = (cache.pages + pages_each - 1) / pages_each;
  const auto length_of = [&](int64_t b, int64_t g) { return cache.length(b, g); };
  const DecodeKernels& kernels = pick_decode_kernels();
  const auto run = [&](int64_t b, int64_t split, const UnitStates& states, void* scratch) {
    const int64_t unit = states.unit[0], g = call.group_of(unit);
    int64_t n_listed;
    const int32_t* const listed = call.list_of(b, unit, length_of(b, g), n_listed);
    if (split < page_splits) {
      for (int64_t i = split * pages_each; i < std::min(cache.pages, (split + 1) * pages_each); ++i) {
        const KvPage page = cache.page(b, g, i);
        if (page.n == 0) continue;
        const int64_t first = cache.first(b, g, i);
        const int32_t* const from = listed ? std::lower_bound(listed, listed + n_listed, int32_t(first)) : nullptr;
        const int64_t left = listed ? listed + n_listed - from : 0;
        if (listed && (left == 0 || *from >= first + page.n)) continue;
        kernels.packed(states.rows[0],
                       {&cache.fmt, page, cache.data_end(), first, from, left, call.dtype != Dtype::f32},
                       states.state[0], scratch);
      }
      return;
    }
    const int64_t begin = (split - page_splits) * kSplitKeys, sealed = cache.sealed(b, g);
    const HeadRows ks = cache.hot_rows(cache.hot_k, b, g), vs = cache.hot_rows(cache.hot_v, b, g);
    const int64_t first = sealed + begin, last = sealed + std::min(ks.count, begin + kSplitKeys);
    const int32_t* const from = listed ? std::lower_bound(listed, listed + n_listed, int32_t(first)) : nullptr;
    const int64_t n = listed ? std::lower_bound(from, listed + n_listed, int32_t(last)) - from : last - first;
    const auto data_of = [](const HeadRows& x) { return static_cast<const char*>(x.data); };
    const auto stride_of = [](const HeadRows& x) { return x.stride * int64_t(x.element_bytes); };
    const EvenRows hot{data_of(ks), data_of(vs), stride_of(ks), stride_of(vs)};
    const std::vector<DenseHead> head{{states.rows[0], states.state[0], 0, 0}};
    const RowPointers pointers(
        {from, first, n},
        [&](int64_t place, int64_t count, const void** keys, const void** values) {
          hot(place - sealed, count, keys, values);
        },
        FirstKeys(call, head));
    kernels.dense(head.data(), 1, pointers.keys(call), scratch);
  };
  return decode_over(
      call, false,
      [&](int64_t b, int64_t unit) { return page_splits + parts_of(cache.hot_len(b, call.group_of(unit))); }, length_of,
      run,
      [&](int64_t b, int64_t g, int64_t split, const KvSide*& key_side, KvChannels& of_keys, const KvSide*& value_side,
          KvChannels& of_values) {
        if (split >= page_splits) return;
        key_side = &cache.fmt.key, value_side = &cache.fmt.value;
        of_keys = cache.channels(0, b, g), of_values = cache.channels(1, b, g);
      });
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) {
  m.impl("decode", TORCH_BOX(&fastok::decode));
  m.impl("decode_packed", TORCH_BOX(&fastok::decode_packed));
}
