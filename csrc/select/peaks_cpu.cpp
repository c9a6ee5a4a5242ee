// CPU backend of density_peaks. Dot products of blocks of tokens, centred so that little cancels, only rule out pairs:
// with the worst that rounding can do to them they bound a squared distance from below. What may matter is then
// computed directly. So every distance used is exact to fp32 rounding, and the same on every backend.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "common/tensor.h"
#include "cpu/scratch.h"
#include "match/match.h"
#include "select/select.h"

namespace fastok {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Tokens of a block: a multiple of every engine's panels.
constexpr int64_t kBlock = 96;

struct Neighbor {
  float distance;  // squared
  int32_t token;

  bool operator<(const Neighbor& other) const {
    return distance < other.distance || (distance == other.distance && token < other.token);
  }
};

// Tokens of one sample, whose distances can be had.
struct Points {
  const char* data;
  Dtype dtype;
  int64_t stride, n, width;
  const SelectKernels& kernels;

  const void* row(int64_t i) const { return data + i * stride * int64_t(element_size(dtype)); }
  float distance(int64_t i, int64_t j) const { return kernels.squared_distance(dtype, row(i), row(j), width); }
};

// ---- bounds ---------------------------------------------------------------------------------------------------------

// The tokens less their mean, packed for dot products, and what turns these into bounds.
class Bounds {
 public:
  explicit Bounds(const Points& points)
      : engine_(pick_match_kernels().fp32),
        points_(points),
        blocks_((points.n + kBlock - 1) / kBlock),
        row_panels_(blocks_ * kBlock / engine_.rows),
        col_panels_(blocks_ * kBlock / engine_.cols),
        centred_(allocate(size_t(points.n * points.width) * sizeof(float))),
        rows_(allocate(size_t(row_panels_) * engine_.row_panel_bytes(points.width))),
        cols_(allocate(size_t(col_panels_) * engine_.col_panel_bytes(points.width))),
        low_(blocks_ * kBlock, kNaN),
        slack_(blocks_ * kBlock, 0.0f) {}

  int64_t blocks() const { return blocks_; }
  float slack(int64_t i, int64_t j) const { return slack_[i] + slack_[j]; }

  // Three steps of preparation; the second and third may be shared out by token and by block.
  void find_centre() {
    centre_.assign(points_.width, 0.0f);
    std::vector<float> zero(points_.width, 0.0f), row(points_.width);
    int64_t finite = 0;
    for (int64_t i = 0; i < points_.n; ++i) {
      const float squares =
          points_.kernels.centred(points_.dtype, points_.row(i), zero.data(), points_.width, row.data());
      if (!(squares < kInfinity)) continue;
      points_.kernels.add_row(points_.dtype, points_.row(i), points_.width, centre_.data());
      ++finite;
    }
    for (float& x : centre_) x = finite > 0 && std::isfinite(x) ? x / float(finite) : 0.0f;
  }
  void centre_rows(int64_t begin, int64_t end) {
    // Products of `width` terms, their sums, the centring, and the direct distance that they stand for each err by at
    // most about width * 2^-24 of the two squared norms; together less than this share of them.
    const float share = float(points_.width + 8) * 0x1p-22f;
    for (int64_t i = begin; i < end; ++i) {
      float* const row = centred(i);
      const float squares = points_.kernels.centred(points_.dtype, points_.row(i), centre_.data(), points_.width, row);
      // Outside this range squares overflow or vanish: nothing is known. A token that is not finite is no neighbour.
      const bool safe = (squares > 0x1p-60f && squares < 0x1p60f) ||
                        std::all_of(row, row + points_.width, [](float y) { return y == 0; });
      low_[i] = safe ? squares * (1.0f - share) : is_finite(i) ? -kInfinity : kNaN;
      slack_[i] = safe ? 2.0f * squares * share : kInfinity;
      if (!safe) std::fill(row, row + points_.width, 0.0f);
    }
  }
  void pack_blocks(int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> scratch(new float[scratch_size()]);
    const Rows rows = rows_of(nullptr, points_.n);
    for (int64_t p = begin * (kBlock / engine_.rows); p < end * (kBlock / engine_.rows); ++p)
      engine_.pack_rows(rows, p, Similarity::dot, rows_.get() + size_t(p) * engine_.row_panel_bytes(points_.width),
                        scratch.get());
    for (int64_t p = begin * (kBlock / engine_.cols); p < end * (kBlock / engine_.cols); ++p)
      engine_.pack_cols(rows, p, Similarity::dot, cols_.get() + size_t(p) * engine_.col_panel_bytes(points_.width),
                        scratch.get());
  }

  // What a thread brings along.
  struct Workspace {
    Scratch dots = allocate(kBlock * kBlock * sizeof(float)), rows;
    std::vector<Candidate> found = std::vector<Candidate>(kBlock * kBlock);
    std::vector<float> scratch;
  };

  // Pairs of tokens of two blocks whose bound is below the bar of either; of a block with itself, of the first.
  int64_t screen(int64_t row_block, int64_t col_block, const float* bar, Workspace& w) const {
    const std::byte* rows =
        rows_.get() + size_t(row_block * (kBlock / engine_.rows)) * engine_.row_panel_bytes(points_.width);
    const int64_t begin = row_block * kBlock, column = col_block * kBlock;
    return screen(rows, std::min(kBlock, points_.n - begin), &low_[begin], bar + begin, col_block,
                  row_block == col_block ? nullptr : bar + column, w);
  }

  // The same for up to kBlock tokens in a list, packed by pack_list.
  void pack_list(const int32_t* tokens, int64_t count, Workspace& w) const {
    const size_t panel = engine_.row_panel_bytes(points_.width);
    if (!w.rows) w.rows = allocate(size_t(kBlock / engine_.rows) * panel);
    w.scratch.resize(scratch_size());
    for (int64_t p = 0; p < kBlock / engine_.rows; ++p)
      engine_.pack_rows(rows_of(tokens, count), p, Similarity::dot, w.rows.get() + size_t(p) * panel, w.scratch.data());
  }
  int64_t screen_list(const float* low, int64_t count, int64_t col_block, const float* bar, Workspace& w) const {
    return screen(w.rows.get(), count, low, bar, col_block, nullptr, w);
  }
  float low(int64_t i) const { return low_[i]; }

 private:
  const PanelEngine& engine_;
  const Points& points_;
  int64_t blocks_, row_panels_, col_panels_;
  Scratch centred_, rows_, cols_;
  std::vector<float> low_, slack_, centre_;

  size_t scratch_size() const { return size_t(std::max(engine_.rows, engine_.cols)) * points_.width + 1; }
  float* centred(int64_t i) const { return reinterpret_cast<float*>(centred_.get()) + i * points_.width; }
  Rows rows_of(const int32_t* tokens, int64_t count) const {
    return {centred_.get(), Dtype::f32, points_.width, tokens, count, points_.width, nullptr, 0};
  }
  bool is_finite(int64_t i) const {
    return points_.distance(i, i) == 0;  // the difference of infinities is NaN
  }
  int64_t screen(const std::byte* rows, int64_t n_rows, const float* low, const float* bar, int64_t col_block,
                 const float* bar_column, Workspace& w) const {
    const std::byte* cols =
        cols_.get() + size_t(col_block * (kBlock / engine_.cols)) * engine_.col_panel_bytes(points_.width);
    float* const dots = reinterpret_cast<float*>(w.dots.get());
    const int64_t row_panels = (n_rows + engine_.rows - 1) / engine_.rows;
    const int64_t column = col_block * kBlock, n_cols = std::min(kBlock, points_.n - column);
    const int64_t col_panels = (n_cols + engine_.cols - 1) / engine_.cols;
    engine_.dots(rows, row_panels, cols, col_panels, points_.width, dots, kBlock);
    return points_.kernels.screen(dots, kBlock, n_rows, n_cols, low, &low_[column], bar, bar_column, w.found.data());
  }
};

// ---- lists of neighbours --------------------------------------------------------------------------------------------

// For each of a number of tokens: those that may be among its k nearest, as bounds or as distances, and the bar that
// others must stay below.
class Lists {
 public:
  Lists(const Points& points, const Bounds& bounds, const int32_t* tokens, int64_t n, int64_t k)
      : points_(points),
        bounds_(bounds),
        tokens_(tokens),
        k_(k),
        capacity_(2 * k + 16),
        entries_(size_t(n * capacity_)),
        size_(n, 0),
        exact_(n, 0),
        bar_((n + kBlock - 1) / kBlock * kBlock, kInfinity) {}

  const float* bar() const { return bar_.data(); }
  const Neighbor* list(int64_t row) const { return &entries_[size_t(row * capacity_)]; }
  int64_t size(int64_t row) const { return size_[row]; }

  void offer(int64_t row, int64_t column, float low) {
    if (!(low < bar_[row])) return;
    if (size_[row] == capacity_) make_room(row);
    entries(row)[size_[row]++] = {low, int32_t(column)};
  }
  // Adds what another list knows about the row.
  void take_over(int64_t row, Lists& other) {
    other.finish(row);
    for (int64_t i = 0; i < other.size(row); ++i) {
      if (size_[row] == capacity_) make_room(row);
      entries(row)[size_[row]++] = {-kInfinity, other.list(row)[i].token};
    }
  }
  // Leaves the k nearest, nearest first.
  void finish(int64_t row) {
    tighten(row);
    measure(row);
  }

 private:
  const Points& points_;
  const Bounds& bounds_;
  const int32_t* tokens_;  // nullptr: row i is token i
  int64_t k_, capacity_;
  std::vector<Neighbor> entries_;
  std::vector<int32_t> size_, exact_;  // the first `exact` entries hold distances
  std::vector<float> bar_;

  Neighbor* entries(int64_t row) { return &entries_[size_t(row * capacity_)]; }
  int64_t token(int64_t row) const { return tokens_ ? tokens_[row] : row; }

  // Bars are compared strictly, and what is as far as the k-th may still come before it.
  void set_bar(int64_t row, float distance) {
    bar_[row] = std::min(bar_[row], std::nextafter(distance + distance * 0x1p-22f, kInfinity));
  }
  void make_room(int64_t row) {
    tighten(row);
    if (size_[row] > capacity_ / 2) measure(row);
  }

  // Drops what k others are certainly nearer than.
  void tighten(int64_t row) {
    Neighbor* const list = entries(row);
    const int64_t size = size_[row], i = token(row);
    if (size <= k_) return;
    thread_local std::vector<float> high;
    high.resize(size);
    for (int64_t e = 0; e < size; ++e) {
      high[e] = e < exact_[row] ? list[e].distance : list[e].distance + bounds_.slack(i, list[e].token);
      if (!(high[e] >= 0)) high[e] = kInfinity;  // a bound of -inf says nothing
    }
    std::nth_element(high.begin(), high.begin() + (k_ - 1), high.end());
    set_bar(row, high[k_ - 1]);
    int64_t kept = 0, exact = 0;
    for (int64_t e = 0; e < size; ++e) {
      if (!(list[e].distance < bar_[row])) continue;
      exact += e < exact_[row];
      list[kept++] = list[e];
    }
    size_[row] = int32_t(kept), exact_[row] = int32_t(exact);
  }

  // Replaces bounds by distances and keeps the k nearest.
  void measure(int64_t row) {
    Neighbor* const list = entries(row);
    int64_t kept = exact_[row];
    for (int64_t e = kept; e < size_[row]; ++e) {
      const float distance = points_.distance(token(row), list[e].token);
      if (distance < kInfinity) list[kept++] = {distance, list[e].token};
    }
    std::sort(list, list + kept);
    size_[row] = exact_[row] = int32_t(std::min(kept, k_));
    if (kept >= k_) set_bar(row, list[k_ - 1].distance);
  }
};

// ---- peaks ----------------------------------------------------------------------------------------------------------

// Calls body(begin, end) for parts of [0, n), in parallel where `shared`.
template <class Body>
void for_parts(bool shared, int64_t n, const Body& body) {
  if (shared) {
    torch::stable::parallel_for(0, n, 1, body);
  } else if (n > 0) {
    body(int64_t(0), n);
  }
}

// Both tokens of each pair of blocks get what the other side offers; each of `workers` has lists of its own.
void find_neighbours(const Bounds& bounds, bool shared, std::vector<Lists>& lists) {
  const int64_t workers = int64_t(lists.size()), blocks = bounds.blocks();
  for_parts(shared, workers, [&](int64_t begin, int64_t end) {
    Bounds::Workspace w;
    for (int64_t worker = begin; worker < end; ++worker) {
      Lists& mine = lists[worker];
      for (int64_t i = 0; i < blocks; ++i) {
        // Rows of blocks become shorter: they are dealt out forwards and backwards in turn.
        const int64_t turn = i % (2 * workers);
        if (turn != worker && turn != 2 * workers - 1 - worker) continue;
        for (int64_t j = i; j < blocks; ++j) {
          const int64_t found = bounds.screen(i, j, mine.bar(), w);
          for (int64_t c = 0; c < found; ++c) {
            const Candidate& pair = w.found[c];
            const int64_t row = i * kBlock + pair.row, column = j * kBlock + pair.column;
            mine.offer(row, column, pair.low);
            if (i != j) mine.offer(column, row, pair.low);
          }
        }
      }
    }
  });
}

float farthest_of(const Points& points, int64_t i) {
  float farthest = 0;
  for (int64_t j = 0; j < points.n; ++j) {
    const float distance = points.distance(i, j);
    if (distance < kInfinity) farthest = std::max(farthest, distance);
  }
  return farthest;
}

// Squared distance to the nearest denser token of those tokens that have none among their neighbours; to the farthest
// of all for those that have none at all.
void separate(const Points& points, const Bounds& bounds, bool shared, const std::vector<int32_t>& peaks,
              const std::vector<int32_t>& density, float* separation) {
  const int64_t count = int64_t(peaks.size());
  for_parts(shared, (count + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
    Bounds::Workspace w;
    for (int64_t block = begin; block < end; ++block) {
      const int32_t* const tokens = peaks.data() + block * kBlock;
      const int64_t n = std::min(kBlock, count - block * kBlock);
      Lists lists(points, bounds, tokens, n, 1);
      float low[kBlock];
      for (int64_t i = 0; i < n; ++i) low[i] = bounds.low(tokens[i]);
      bounds.pack_list(tokens, n, w);
      for (int64_t j = 0; j < bounds.blocks(); ++j) {
        const int64_t found = bounds.screen_list(low, n, j, lists.bar(), w);
        for (int64_t c = 0; c < found; ++c) {
          const Candidate& pair = w.found[c];
          const int64_t column = j * kBlock + pair.column;
          if (density[column] < density[tokens[pair.row]]) lists.offer(pair.row, column, pair.low);
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        lists.finish(i);
        separation[tokens[i]] = lists.size(i) > 0 ? lists.list(i)->distance : farthest_of(points, tokens[i]);
      }
    }
  });
}

void peaks_of(const Points& points, int64_t k, int64_t neighbors, int64_t workers, int64_t* out) {
  const int64_t n = points.n;
  const bool shared = workers > 1;
  Bounds bounds(points);
  bounds.find_centre();
  for_parts(shared, n, [&](int64_t begin, int64_t end) { bounds.centre_rows(begin, end); });
  for_parts(shared, bounds.blocks(), [&](int64_t begin, int64_t end) { bounds.pack_blocks(begin, end); });
  std::vector<Lists> lists;
  for (int64_t i = 0; i < workers; ++i) lists.emplace_back(points, bounds, nullptr, n, neighbors);
  find_neighbours(bounds, shared, lists);

  // Mean squared distance to the neighbours: the lower, the denser.
  std::vector<double> spread(n);
  for_parts(shared, n, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t other = 1; other < workers; ++other) lists[0].take_over(i, lists[other]);
      lists[0].finish(i);
      const int64_t count = lists[0].size(i);
      double sum = 0;
      for (int64_t e = 0; e < count; ++e) sum += double(lists[0].list(i)[e].distance);
      spread[i] = count > 0 ? sum / double(count * std::max<int64_t>(points.width, 1))
                            : std::numeric_limits<double>::infinity();
    }
  });
  std::vector<int32_t> order(n), density(n), peaks;
  for (int64_t i = 0; i < n; ++i) order[i] = int32_t(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return spread[i] < spread[j]; });
  for (int64_t place = 0; place < n; ++place) density[order[place]] = int32_t(place);

  // The nearest denser token is among the neighbours of all but a few.
  std::vector<float> separation(n, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    const Neighbor *list = lists[0].list(i), *end = list + lists[0].size(i);
    if (list == end) continue;  // not finite
    const Neighbor* denser = std::find_if(list, end, [&](const Neighbor& e) { return density[e.token] < density[i]; });
    if (denser != end) {
      separation[i] = denser->distance;
    } else {
      peaks.push_back(int32_t(i));
    }
  }
  separate(points, bounds, shared, peaks, density, separation.data());

  std::vector<float> score(n);
  for (int64_t i = 0; i < n; ++i)
    score[i] = lists[0].size(i) > 0 ? float(std::log(double(separation[i])) / 2 - spread[i]) : kNaN;
  std::vector<uint32_t> keys(n);
  points.kernels.keys(Dtype::f32, score.data(), 1, n, keys.data());
  top_by_score(keys.data(), n, k, out);
}

Tensor density_peaks(Tensor x, int64_t k, int64_t neighbors) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B,N,D]");
  const Dtype dtype = dtype_of(x, "x");
  const Tensor rows = with_dense_rows(x);
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(k >= 0 && k <= n, "k must be within [0, N=", n, "], got ", k);
  STD_TORCH_CHECK(neighbors >= 1 && neighbors <= std::max<int64_t>(n, 1), "neighbors must be within [1, N=", n,
                  "], got ", neighbors);
  STD_TORCH_CHECK(n < int64_t(1) << 31, "x has too many tokens: ", n);
  const Tensor index = empty_like_device(x, {batch, k}, ScalarType::Long);
  if (batch * k == 0) return index;
  const SelectKernels& kernels = pick_select_kernels();
  const auto sample = [&](int64_t b, int64_t workers) {
    const char* base =
        static_cast<const char*>(rows.const_data_ptr()) + b * rows.stride(0) * int64_t(element_size(dtype));
    peaks_of({base, dtype, rows.stride(1), n, width, kernels}, k, neighbors, workers, data<int64_t>(index) + b * k);
  };
  const int64_t threads = torch::stable::get_num_threads();
  const bool tiny = double(n) * double(n) * double(width + 8) < 1e6;
  if (batch >= threads || tiny) {
    torch::stable::parallel_for(0, batch, tiny ? 8 : 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) sample(b, 1);
    });
  } else {
    for (int64_t b = 0; b < batch; ++b) sample(b, threads);
  }
  return index;
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("density_peaks", TORCH_BOX(&fastok::density_peaks)); }
