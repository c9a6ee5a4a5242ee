// CPU backend of decode attention: sharing out heads and keys, merging. The arithmetic is in decode_simd.cpp.
#include "decode/decode.h"

#include <atomic>
#include <numeric>
#include <tuple>

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

// Some keys of a unit: `run` adds them to the state; `sides_of` says in which basis the queries and the sums are.
template <class Splits, class Length, class Run, class Sides>
std::tuple<Tensor, Tensor> decode_over(const DecodeCall& call, const Splits& splits_of, const Length& length_of,
                                       const Run& run, const Sides& sides_of) {
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
  std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) {
    return std::pair(tasks[x].b, tasks[x].split) < std::pair(tasks[y].b, tasks[y].split);
  });
  const int64_t unit_rows = call.unit_rows(), pitch = decode_pitch(call.width), v_pitch = decode_pitch(call.v_width);
  const int64_t element = int64_t(element_size(call.dtype)), widest = std::max(call.width, call.v_width);
  std::vector<float> partial(tasks.size() * size_t(unit_rows * call.v_width)),
      partial_lse(tasks.size() * size_t(unit_rows));
  const DecodeKernels& kernels = pick_decode_kernels();
  const AttentionKernels& attention = pick_attention_kernels();
  std::atomic<size_t> taken{0};  // by whoever is free: splits differ in length
  torch::stable::parallel_for(0, int64_t(tasks.size()), 1, [&](int64_t, int64_t) {
    const size_t floats = size_t(unit_rows * (pitch + v_pitch + 2));
    const AlignedMemory memory(floats * sizeof(float)), scratch(kernels.scratch_bytes(unit_rows, widest));
    float* const q = static_cast<float*>(memory.get());
    const DecodeState state{q + unit_rows * pitch, q + unit_rows * (pitch + v_pitch),
                            q + unit_rows * (pitch + v_pitch + 1)};
    std::vector<int64_t> last(size_t(unit_rows), 0);
    std::vector<const float*> bias(size_t(unit_rows), nullptr);
    for (size_t i = taken++; i < order.size(); i = taken++) {
      const size_t task = order[i];
      const UnitTask& t = tasks[task];
      float* const part = partial.data() + task * size_t(unit_rows * call.v_width);
      float* const part_lse = partial_lse.data() + task * size_t(unit_rows);
      const int64_t g = call.group_of(t.unit), length = length_of(t.b, g);
      const KvSide *key_side = nullptr, *value_side = nullptr;
      KvChannels key_channels{}, value_channels{};
      sides_of(t.b, g, t.split, key_side, key_channels, value_side, value_channels);
      for (int64_t r = 0; r < unit_rows; ++r) {
        const int64_t h = t.unit * call.ratio() + r / call.rows, row = r % call.rows;
        const int64_t at = t.b * call.q.stride(0) + row * call.q.stride(1) + h * call.q.stride(2);
        kernels.prepare(static_cast<const char*>(call.q.const_data_ptr()) + at * element, call.dtype, call.width,
                        call.scale, key_side, key_channels, q + r * pitch);
        last[size_t(r)] = length - call.rows + row;
        bias[size_t(r)] = call.bias_of(t.b, h);
        state.peak[r] = -std::numeric_limits<float>::infinity();
        state.total[r] = 0;
      }
      std::fill(state.sum, state.sum + unit_rows * v_pitch, 0.0f);
      const DecodeRows rows{unit_rows, q, last.data(), call.has_bias ? bias.data() : nullptr, call.softcap};
      run(t.b, t.unit, t.split, rows, state, scratch.get());
      kernels.finish(state, unit_rows, call.v_width, value_side, value_channels, part, part_lse);
    }
  });
  torch::stable::parallel_for(0, call.batch * call.heads * call.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % call.rows, h = i / call.rows % call.heads, b = i / call.rows / call.heads;
      const int64_t unit = h / call.ratio(), r = h % call.ratio() * call.rows + row;
      const auto task = std::lower_bound(tasks.begin(), tasks.end(), std::pair(b, unit),
                                         [](const UnitTask& t, auto of) { return std::pair(t.b, t.unit) < of; });
      const int64_t first = task - tasks.begin();
      const bool some = task != tasks.end() && task->b == b && task->unit == unit;
      char* const to = static_cast<char*>(out.mutable_data_ptr()) +
                       ((b * call.rows + row) * call.heads + h) * call.v_width * element;
      attention.merge_parts(partial.data() + (first * unit_rows + r) * call.v_width, unit_rows * call.v_width,
                            partial_lse.data() + first * unit_rows + r, unit_rows, some ? task->n_splits : 0,
                            call.v_width, call.dtype, to, data<float>(lse) + (b * call.heads + h) * call.rows + row);
    }
  });
  return {out, lse};
}

int64_t parts_of(int64_t keys) { return (keys + kSplitKeys - 1) / kSplitKeys; }

// Places that take part, as rows in memory: all of [begin, end), or those listed, which have to outlive this.
struct RowPointers {
  std::vector<const void*> k, v;
  std::vector<int32_t> range;
  const int32_t* place;
  bool listed;

  template <class At>
  RowPointers(int64_t begin, int64_t end, const At& at) : range(size_t(std::max<int64_t>(end - begin, 0))) {
    std::iota(range.begin(), range.end(), int32_t(begin));
    place = range.data(), listed = false;
    point(int64_t(range.size()), at);
  }
  template <class At>
  RowPointers(const int32_t* list, int64_t count, const At& at) : place(list), listed(true) {
    point(count, at);
  }
  DenseKeys keys(Dtype dtype, int64_t width, int64_t v_width) const {
    return {dtype, k.data(), v.data(), place, int64_t(k.size()), width, v_width, listed};
  }

 private:
  template <class At>
  void point(int64_t count, const At& at) {
    k.resize(size_t(count)), v.resize(size_t(count));
    for (size_t i = 0; i < size_t(count); ++i) at(place[i], k[i], v[i]);
  }
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
  const void* at(int64_t b, int64_t t, int64_t g) const { return base + b * block + t * token + g * head; }
};

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
  const auto run = [&](int64_t b, int64_t unit, int64_t split, const DecodeRows& rows, const DecodeState& state,
                       void* scratch) {
    const int64_t g = call.group_of(unit), length = length_of(b, g), begin = split * kSplitKeys;
    int64_t n_listed;
    const int32_t* const listed = call.list_of(b, unit, length, n_listed);
    const auto row_of = [&](int64_t i, const void*& key, const void*& value) {
      const int64_t block = blocks_of ? blocks_of[b * table.size(1) + i / page] : b;
      const int64_t token = blocks_of ? i % page : i;
      key = k_rows.at(block, token, g);
      value = v_rows.at(block, token, g);
    };
    const int64_t count = std::min((listed ? n_listed : length) - begin, kSplitKeys);
    const RowPointers pointers =
        listed ? RowPointers(listed + begin, count, row_of) : RowPointers(begin, begin + count, row_of);
    kernels.dense(rows, pointers.keys(call.dtype, call.width, call.v_width), state, scratch);
  };
  // As many keys to a split whether they are listed or not: a list of all gives the same bits as none.
  const auto splits_of = [&](int64_t b, int64_t unit) {
    int64_t n_listed;
    const int64_t length = length_of(b, call.group_of(unit));
    return parts_of(call.list_of(b, unit, length, n_listed) ? n_listed : length);
  };
  return decode_over(call, splits_of, length_of, run,
                     [](int64_t, int64_t, int64_t, const KvSide*&, KvChannels&, const KvSide*&, KvChannels&) {});
}

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
  const auto run = [&](int64_t b, int64_t unit, int64_t split, const DecodeRows& rows, const DecodeState& state,
                       void* scratch) {
    const int64_t g = call.group_of(unit);
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
        kernels.packed(rows, {&cache.fmt, page, cache.data_end(), first, from, left, call.dtype != Dtype::f32}, state,
                       scratch);
      }
      return;
    }
    const int64_t begin = (split - page_splits) * kSplitKeys, sealed = cache.sealed(b, g);
    const HeadRows ks = cache.hot_rows(cache.hot_k, b, g), vs = cache.hot_rows(cache.hot_v, b, g);
    const auto row_of = [&](const HeadRows& x, int64_t i) -> const void* {
      return static_cast<const char*>(x.data) + i * x.stride * x.element_bytes;
    };
    const auto rows_of = [&](int64_t i, const void*& key, const void*& value) {
      key = row_of(ks, i - sealed);
      value = row_of(vs, i - sealed);
    };
    const int64_t first = sealed + begin, last = sealed + std::min(ks.count, begin + kSplitKeys);
    const int32_t* const from = listed ? std::lower_bound(listed, listed + n_listed, int32_t(first)) : nullptr;
    const RowPointers pointers =
        listed ? RowPointers(from, std::lower_bound(from, listed + n_listed, int32_t(last)) - from, rows_of)
               : RowPointers(first, last, rows_of);
    kernels.dense(rows, pointers.keys(call.dtype, call.width, call.v_width), state, scratch);
  };
  return decode_over(
      call, [&](int64_t b, int64_t unit) { return page_splits + parts_of(cache.hot_len(b, call.group_of(unit))); },
      length_of, run,
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
