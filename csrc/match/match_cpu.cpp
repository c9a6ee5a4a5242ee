// CPU backend of bipartite_match and nearest: scheduling over torch's threads, selection, and map building. The
// arithmetic is in match_simd.cpp.
#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "cpu/scratch.h"
#include "match/match.h"
#include "merge/merge.h"

namespace fastok {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- panels ---------------------------------------------------------------------------------------------------------

// One sample's rows and columns, packed into panels of one engine.
struct Panels {
  const PanelEngine& engine;
  Similarity similarity;
  int64_t width, n_row_panels, n_col_panels;
  size_t row_bytes, col_bytes;

  Panels(const PanelEngine& engine_in, Similarity similarity_in, int64_t n_rows, int64_t n_cols, int64_t width_in)
      : engine(engine_in),
        similarity(similarity_in),
        width(width_in),
        n_row_panels((n_rows + engine.rows - 1) / engine.rows),
        n_col_panels((n_cols + engine.cols - 1) / engine.cols),
        row_bytes(engine.row_panel_bytes(width)),
        col_bytes(engine.col_panel_bytes(width)) {}

  size_t bytes() const { return col_offset(n_col_panels); }
  int64_t n_panels() const { return n_row_panels + n_col_panels; }
  int64_t padded_rows() const { return n_row_panels * engine.rows; }
  double flops() const { return 2.0 * double(padded_rows()) * double(n_col_panels * engine.cols) * double(width); }

  // `memory` holds bytes(). Panels [begin, end): the rows', then the columns'.
  void pack(const Rows& rows, const Rows& cols, int64_t begin, int64_t end, std::byte* memory) const {
    const std::unique_ptr<float[]> scratch(new float[size_t(std::max(engine.rows, engine.cols)) * width + 1]);
    for (int64_t p = begin; p < end; ++p) {
      if (p < n_row_panels) {
        engine.pack_rows(rows, p, similarity, memory + size_t(p) * row_bytes, scratch.get());
      } else {
        engine.pack_cols(cols, p - n_row_panels, similarity, memory + col_offset(p - n_row_panels), scratch.get());
      }
    }
  }
  // Of `count` row panels from `first` on; `score` and `mate` start at the first one's rows.
  void best(const std::byte* memory, int64_t first, int64_t count, float* score, int32_t* mate) const {
    engine.best(memory + size_t(first) * row_bytes, count, memory + col_offset(0), n_col_panels, width, similarity,
                score, mate);
  }
  void best_k(const std::byte* memory, int64_t panel, int64_t n_rows, int64_t k, float* score, int64_t* index) const {
    engine.best_k(memory + size_t(panel) * row_bytes, n_rows, memory + col_offset(0), n_col_panels, width, similarity,
                  k, score, index);
  }

 private:
  // Columns begin on a cache line.
  size_t col_offset(int64_t p) const {
    return (size_t(n_row_panels) * row_bytes + 63) / 64 * 64 + size_t(p) * col_bytes;
  }
};

// Calls body(sample, begin, end) for `count` items of each sample; at least `grain` of them are worth a thread.
template <class Body>
void for_items(int64_t batch, int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, batch * count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t b = at / count, first = at % count, stop = std::min(count, first + end - at);
      body(b, first, stop);
      at += stop - first;
    }
  });
}

int64_t pack_grain(const Panels& panels) { return 1 + (16 << 10) / (int64_t(panels.col_bytes) + 1); }

// Calls body(sample, first row panel, count): groups large enough to reuse the columns in cache, and enough of them to
// share out.
template <class Body>
void for_row_panels(const Panels& panels, int64_t batch, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t group = std::clamp<int64_t>(batch * panels.n_row_panels / (threads * 4), 1, 8);
  const int64_t groups = (panels.n_row_panels + group - 1) / group;
  const double flops = panels.flops() / double(groups);
  for_items(batch, groups, 1 + int64_t(200e3 / (flops + 1)), [&](int64_t b, int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) body(b, g * group, std::min(group, panels.n_row_panels - g * group));
  });
}

const PanelEngine& choose_engine(Dtype dtype, Similarity similarity, int64_t width, int64_t k) {
  constexpr int64_t tile_depth = 32;
  const MatchKernels& kernels = pick_match_kernels();
  const bool tiles =
      kernels.bf16 && dtype == Dtype::bf16 && similarity == Similarity::cosine && width >= tile_depth && k == 1;
  return tiles ? *kernels.bf16 : kernels.fp32;
}

// Splitting rows is worth while if each meets many, but not so many that their numbers take a product's digits.
const PanelEngine& choose_engine(Dtype dtype, int64_t n_cols, int64_t width) {
  constexpr int64_t fewest_columns = 64, most_columns = 1 << 15, fewest_channels = 32;
  const MatchKernels& kernels = pick_match_kernels();
  const bool splits = kernels.split && dtype != Dtype::bf16 && n_cols >= fewest_columns && n_cols <= most_columns &&
                      width >= fewest_channels;
  return splits ? *kernels.split : choose_engine(dtype, Similarity::cosine, width, 1);
}

// ---- bipartite_match ------------------------------------------------------------------------------------------------

// Positions of one side of the partition, shared by the batch or per sample.
struct Side {
  std::vector<int32_t> positions;
  int64_t count;
  bool per_sample;

  const int32_t* of(int64_t b) const { return positions.data() + (per_sample ? b * count : 0); }
};

Side every_other(int64_t n, int32_t first) {
  Side side{{}, (n - first + 1) / 2, false};
  side.positions.resize(side.count);
  for (int64_t i = 0; i < side.count; ++i) side.positions[i] = first + int32_t(2 * i);
  return side;
}

Side side_of(const Tensor& index, int64_t batch, int64_t n, const char* name) {
  const Tensor dense = checked_contiguous(index, ScalarType::Long, name);
  STD_TORCH_CHECK(dense.dim() == 1 || (dense.dim() == 2 && dense.size(0) == batch), name, " must be [n] or [B,n]");
  Side side{{}, dense.size(dense.dim() - 1), dense.dim() == 2};
  const int64_t* p = const_data<int64_t>(dense);
  side.positions.resize(dense.numel());
  for (size_t i = 0; i < side.positions.size(); ++i) {
    STD_TORCH_CHECK(p[i] >= 0 && p[i] < n, name, " must be within [0, ", n, "), got ", p[i]);
    side.positions[i] = int32_t(p[i]);
  }
  return side;
}

struct Selection {
  int64_t n, r, protect;
  std::optional<double> threshold;
  bool sorted_order, static_shape;
};

// Sorts as (group ascending, score descending, index ascending).
uint64_t sort_key(uint64_t group, float score, int64_t index) {
  score += 0.0f;  // -0 ties with 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  const uint32_t descending = bits & 0x80000000 ? bits : ~(bits | 0x80000000);
  return group << 62 | uint64_t(descending) << 30 | uint64_t(index);
}
constexpr uint64_t kIndexMask = (1u << 30) - 1;

// From each source's best destination to the slots of one sample. Returns how many are used.
int32_t select_and_number(const Selection& s, const int32_t* src, int64_t n_src, const int32_t* dst, int64_t n_dst,
                          const float* score, int32_t* mate, const float* bias, int32_t* assign) {
  if (s.r == 0) {
    for (int64_t i = 0; i < s.n; ++i) assign[i] = int32_t(i);
    return int32_t(s.n);
  }

  // The r best sources. Group 0 may merge, 1 only to keep a static shape, 2 not at all.
  std::vector<uint64_t> order(n_src);
  const auto key_of = [&](int64_t i) { return bias ? score[i] + bias[src[i]] : score[i]; };
  const auto scored = [&](int64_t i) { return mate[i] >= 0 && key_of(i) == key_of(i); };
  const bool fill = s.static_shape && !s.threshold;
  int64_t mergeable = 0;
  for (int64_t i = 0; i < n_src; ++i) {
    const bool free = src[i] >= s.protect, ok = free && scored(i);
    const bool above = ok && (!s.threshold || score[i] > *s.threshold);
    const uint64_t group = above ? 0 : fill && free ? 1 : 2;
    mergeable += group < 2;
    order[i] = sort_key(group, ok ? key_of(i) : 0.0f, i);
  }
  const int64_t n_merged = std::min(s.r, mergeable);
  if (n_merged <= 0) {
    for (int64_t i = 0; i < s.n; ++i) assign[i] = int32_t(i);
    return int32_t(s.n);
  }
  if (n_merged < n_src) std::nth_element(order.begin(), order.begin() + n_merged, order.end());

  // Who keeps a slot: 0 protected or in neither list, 1 kept source, 2 destination; 3 does not.
  std::vector<uint8_t> kind(s.n, 0);
  for (int64_t j = 0; j < n_dst; ++j)
    if (dst[j] >= s.protect) kind[dst[j]] = 2;
  for (int64_t i = 0; i < n_src; ++i)
    if (src[i] >= s.protect) kind[src[i]] = 1;
  int32_t first_allowed = 0;
  while (first_allowed + 1 < n_dst && dst[first_allowed] < s.protect) ++first_allowed;
  for (int64_t i = 0; i < n_merged; ++i) {
    const int64_t source = order[i] & kIndexMask;
    kind[src[source]] = 3;
    if (!scored(source)) mate[source] = first_allowed;
  }

  std::fill(assign, assign + s.n, -1);
  int32_t slot = 0;
  if (s.sorted_order) {
    std::vector<int32_t> lowest(s.n), owner(s.n, -1);
    for (int64_t i = 0; i < s.n; ++i) lowest[i] = int32_t(i);
    for (int64_t i = 0; i < n_merged; ++i) {
      const int64_t source = order[i] & kIndexMask;
      int32_t& low = lowest[dst[mate[source]]];
      low = std::min(low, src[source]);
    }
    for (int64_t i = 0; i < s.n; ++i)
      if (kind[i] != 3) owner[lowest[i]] = int32_t(i);
    for (int64_t i = 0; i < s.n; ++i)
      if (owner[i] >= 0) assign[owner[i]] = slot++;
  } else {
    for (int64_t i = 0; i < s.n; ++i)
      if (kind[i] == 0) assign[i] = slot++;
    if (s.protect > 0) {
      for (int64_t i = 0; i < s.n; ++i)
        if (kind[i] == 1) assign[i] = slot++;
    } else {
      for (int64_t i = n_merged; i < n_src; ++i) {
        const int64_t source = order[i] & kIndexMask;
        order[i] = scored(source) ? sort_key(0, key_of(source), source) : sort_key(1, 0.0f, source);
      }
      std::sort(order.begin() + n_merged, order.end());
      for (int64_t i = n_merged; i < n_src; ++i) assign[src[order[i] & kIndexMask]] = slot++;
    }
    for (int64_t j = 0; j < n_dst; ++j)
      if (kind[dst[j]] == 2) assign[dst[j]] = slot++;
  }
  for (int64_t i = 0; i < n_merged; ++i) {
    const int64_t source = order[i] & kIndexMask;
    assign[src[source]] = assign[dst[mate[source]]];
  }
  return slot;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bipartite_match(Tensor metric, int64_t r, int64_t protect,
                                                           std::optional<double> threshold, std::optional<Tensor> bias,
                                                           std::optional<Tensor> src, std::optional<Tensor> dst,
                                                           bool sorted_order, bool static_shape) {
  STD_TORCH_CHECK(metric.dim() == 3, "metric must be [B,N,D]");
  const Dtype dtype = dtype_of(metric, "metric");
  const Tensor x = with_dense_rows(metric);
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(n < int64_t(kIndexMask), "metric has too many tokens: ", n);
  STD_TORCH_CHECK(src.has_value() == dst.has_value(), "src and dst go together");
  Tensor bias_dense;
  if (bias) {
    bias_dense = checked_contiguous(*bias, ScalarType::Float, "bias");
    STD_TORCH_CHECK(bias_dense.numel() == batch * n, "bias must be [B,N]");
  }

  const Side sources = src ? side_of(*src, batch, n, "src") : every_other(n, 0);
  const Side targets = dst ? side_of(*dst, batch, n, "dst") : every_other(n, 1);
  if (r < 0 || sources.count == 0 || targets.count == 0) r = 0;
  int64_t n_out = threshold ? n : n - r;
  const Tensor assign = empty_like_device(x, {batch, n}, ScalarType::Int);
  const Tensor counts = empty_like_device(x, {batch}, ScalarType::Int);
  const Tensor members = empty_like_device(x, {batch, n}, ScalarType::Int);
  Tensor offsets = empty_like_device(x, {batch, n_out + 1}, ScalarType::Int);
  int32_t *assigned = data<int32_t>(assign), *used = data<int32_t>(counts);

  const Panels panels(choose_engine(dtype, targets.count, width), Similarity::cosine, sources.count, targets.count,
                      width);
  const auto rows_of = [&](int64_t b, const Side& side, int64_t first_position) {
    const char* base = static_cast<const char*>(x.const_data_ptr()) + b * x.stride(0) * int64_t(element_size(dtype));
    return Rows{base, dtype, x.stride(1), side.of(b), side.count, width, nullptr, first_position};
  };
  const auto pack = [&](int64_t b, int64_t begin, int64_t end, std::byte* memory) {
    panels.pack(rows_of(b, sources, 0), rows_of(b, targets, protect), begin, end, memory);
  };
  const Selection selection{n, r, protect, threshold, sorted_order, static_shape};
  // The rows that the engine has left undecided.
  const auto decide = [&](int64_t b, float* score, int32_t* mate) {
    std::vector<int32_t> row, position;
    for (int64_t i = 0; i < sources.count; ++i) {
      if (mate[i] != kUndecided) continue;
      row.push_back(int32_t(i));
      position.push_back(sources.of(b)[i]);
    }
    if (row.empty()) return;
    const Side side{position, int64_t(position.size()), false};
    const Panels exact(pick_match_kernels().fp32, Similarity::cosine, side.count, targets.count, width);
    const Scratch memory = allocate(exact.bytes());
    std::vector<float> scores(exact.padded_rows());
    std::vector<int32_t> mates(exact.padded_rows());
    for_items(1, exact.n_panels(), pack_grain(exact), [&](int64_t, int64_t begin, int64_t end) {
      exact.pack(rows_of(b, side, 0), rows_of(b, targets, protect), begin, end, memory.get());
    });
    for_row_panels(exact, 1, [&](int64_t, int64_t first, int64_t count) {
      const int64_t at = first * exact.engine.rows;
      exact.best(memory.get(), first, count, scores.data() + at, mates.data() + at);
    });
    for (size_t i = 0; i < row.size(); ++i) score[row[i]] = scores[i], mate[row[i]] = mates[i];
  };
  const auto finish = [&](int64_t b, const float* score, int32_t* mate) {
    used[b] = select_and_number(selection, sources.of(b), sources.count, targets.of(b), targets.count, score, mate,
                                bias ? const_data<float>(bias_dense) + b * n : nullptr, assigned + b * n);
    if (used[b] <= n_out)
      build_csr(assigned + b * n, 1, n, n_out, data<int32_t>(offsets) + b * (n_out + 1),
                data<int32_t>(members) + b * n);
  };

  const int64_t padded = panels.padded_rows();
  if (r == 0 || batch >= torch::stable::get_num_threads()) {
    // Samples are shared out whole: one round of threads, and each sample's panels stay in a thread's own cache.
    const int64_t grain = 1 + int64_t(100e3 / (panels.flops() + 50.0 * double(n * width) + 1));
    torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
      const Scratch memory = allocate(panels.bytes());
      const std::unique_ptr<float[]> score(new float[padded]);
      const std::unique_ptr<int32_t[]> mate(new int32_t[padded]);
      for (int64_t b = begin; b < end; ++b) {
        if (r > 0) {
          pack(b, 0, panels.n_panels(), memory.get());
          panels.best(memory.get(), 0, panels.n_row_panels, score.get(), mate.get());
          decide(b, score.get(), mate.get());
        }
        finish(b, score.get(), mate.get());
      }
    });
  } else {
    const Scratch memory = allocate(size_t(batch) * panels.bytes());
    const auto of = [&](int64_t b) { return memory.get() + size_t(b) * panels.bytes(); };
    const std::unique_ptr<float[]> score(new float[batch * padded]);
    const std::unique_ptr<int32_t[]> mate(new int32_t[batch * padded]);
    for_items(batch, panels.n_panels(), pack_grain(panels),
              [&](int64_t b, int64_t begin, int64_t end) { pack(b, begin, end, of(b)); });
    for_row_panels(panels, batch, [&](int64_t b, int64_t first, int64_t count) {
      const int64_t at = b * padded + first * panels.engine.rows;
      panels.best(of(b), first, count, score.get() + at, mate.get() + at);
    });
    for (int64_t b = 0; b < batch; ++b) decide(b, score.get() + b * padded, mate.get() + b * padded);
    torch::stable::parallel_for(0, batch, 1 + 2048 / (n + 1), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) finish(b, score.get() + b * padded, mate.get() + b * padded);
    });
  }

  // NaN left fewer sources than r somewhere.
  const int64_t most_used = batch > 0 ? *std::max_element(used, used + batch) : 0;
  if (most_used > n_out) {
    n_out = most_used;
    offsets = empty_like_device(x, {batch, n_out + 1}, ScalarType::Int);
    build_csr(assigned, batch, n, n_out, data<int32_t>(offsets), data<int32_t>(members));
  }
  return {assign, counts, offsets, members};
}

// ---- nearest --------------------------------------------------------------------------------------------------------

Similarity similarity_of(const std::string& name) {
  if (name == "cosine") return Similarity::cosine;
  if (name == "dot") return Similarity::dot;
  STD_TORCH_CHECK(name == "euclidean", "similarity must be cosine, dot or euclidean; got ", name);
  return Similarity::euclidean;
}

std::tuple<Tensor, Tensor> nearest(Tensor x, Tensor y, int64_t k, std::string similarity_name,
                                   std::optional<Tensor> mask) {
  STD_TORCH_CHECK(x.dim() == 3 && y.dim() == 3 && x.size(0) == y.size(0) && x.size(2) == y.size(2),
                  "x must be [B,N,D] and y [B,M,D]");
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x and y must have the same dtype");
  STD_TORCH_CHECK(k >= 1 && k <= y.size(1), "k must be within [1, M=", y.size(1), "], got ", k);
  const Similarity similarity = similarity_of(similarity_name);
  const Dtype dtype = dtype_of(x, "x");
  x = with_dense_rows(x);
  y = with_dense_rows(y);
  const int64_t batch = x.size(0), n = x.size(1), m = y.size(1), width = x.size(2);
  Tensor allowed;
  if (mask) {
    allowed = checked_contiguous(*mask, ScalarType::Bool, "mask");
    STD_TORCH_CHECK(allowed.numel() == batch * m, "mask must be [B,M]");
  }
  const Tensor value = empty_like_device(x, {batch, n, k}, ScalarType::Float);
  const Tensor index = empty_like_device(x, {batch, n, k}, ScalarType::Long);
  if (batch * n == 0) return {value, index};

  const Panels panels(choose_engine(dtype, similarity, width, k), similarity, n, m, width);
  const auto rows_of = [&](const Tensor& t, int64_t b, const bool* ok) {
    const char* base = static_cast<const char*>(t.const_data_ptr()) + b * t.stride(0) * int64_t(element_size(dtype));
    return Rows{base, dtype, t.stride(1), nullptr, t.size(1), width, ok, 0};
  };
  const Scratch memory = allocate(size_t(batch) * panels.bytes());
  const auto of = [&](int64_t b) { return memory.get() + size_t(b) * panels.bytes(); };
  for_items(batch, panels.n_panels(), pack_grain(panels), [&](int64_t b, int64_t begin, int64_t end) {
    panels.pack(rows_of(x, b, nullptr), rows_of(y, b, mask ? const_data<bool>(allowed) + b * m : nullptr), begin, end,
                of(b));
  });
  float* values = data<float>(value);
  int64_t* indices = data<int64_t>(index);
  for_row_panels(panels, batch, [&](int64_t b, int64_t first, int64_t count) {
    for (int64_t p = first; p < first + count; ++p) {
      const int64_t row = p * panels.engine.rows, at = (b * n + row) * k;
      const int64_t n_rows = std::min<int64_t>(panels.engine.rows, n - row);
      if (k > 1) {
        panels.best_k(of(b), p, n_rows, k, values + at, indices + at);
        continue;
      }
      float score[64];
      int32_t mate[64];
      panels.best(of(b), p, 1, score, mate);
      std::copy(score, score + n_rows, values + at);
      std::copy(mate, mate + n_rows, indices + at);
    }
  });
  return {value, index};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) {
  m.impl("bipartite_match", TORCH_BOX(&fastok::bipartite_match));
  m.impl("nearest", TORCH_BOX(&fastok::nearest));
}
