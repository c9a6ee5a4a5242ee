// CPU backend of k_center. The arithmetic is in k_center_simd.cpp, approximate distances in screen.h.
#include <string>
#include <tuple>

#include "common/tensor.h"
#include "cpu/exact_cosines.h"
#include "k_center/screen.h"

namespace fastok {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// One sample.
struct Tokens {
  const CenterKernels& kernels;
  TokenRows rows;
  bool cosine;
  std::vector<TokenScale> scales;
  std::unique_ptr<bool[]> available;  // finite, not masked, not picked
  Scratch cosines;                    // [count][count], if `compare` made them

  Tokens(const CenterKernels& kernels_in, const TokenRows& rows_in, bool cosine_in, const bool* mask)
      : kernels(kernels_in),
        rows(rows_in),
        cosine(cosine_in),
        scales(rows_in.count),
        available(new bool[rows_in.count]) {
    torch::stable::parallel_for(0, rows.count, grain(),
                                [&](int64_t begin, int64_t end) { kernels.measure(rows, begin, end, scales.data()); });
    for (int64_t i = 0; i < rows.count; ++i) available[i] = scales[i].finite && (!mask || mask[i]);
  }

  int64_t grain() const { return 1 + (1 << 16) / (rows.width + 1); }

  // A token as the kernels want the other side of a distance.
  const double* center(int64_t i, std::vector<double>& memory) const {
    memory.assign(size_t(rows.width + 31) / 32 * 32, 0.0);
    kernels.widen(rows, i, cosine ? scales[i].scale : 0.0f, memory.data());
    return memory.data();
  }
  void distances(const double* center, int64_t i, int64_t begin, int64_t end, float* out) const {
    if (cosine) {
      kernels.cosine_distances(rows, scales.data(), center, scales[i].norm, begin, end, out);
    } else {
      kernels.euclidean_distances(rows, center, begin, end, out);
    }
  }
  // All cosines by tile products. False if the tokens do not allow it.
  bool compare() {
    cosines = allocate(size_t(rows.count * rows.count) * sizeof(float));
    const ExactTiles& tiles = *exact_tiles_for(rows.width);
    if (!exact_cosines(tiles, rows, scales.data(), rows, scales.data(), reinterpret_cast<float*>(cosines.get()),
                       rows.count))
      cosines.reset();
    return cosines != nullptr;
  }
  const float* cosines_of(int64_t i) const { return reinterpret_cast<const float*>(cosines.get()) + i * rows.count; }

  // To all tokens.
  void distances(int64_t i, float* out) const {
    if (cosines) {
      const float* const cosine_to = cosines_of(i);
      for (int64_t j = 0; j < rows.count; ++j) out[j] = 1.0f - cosine_to[j];
      return;
    }
    std::vector<double> memory;
    const double* const c = center(i, memory);
    torch::stable::parallel_for(0, rows.count, grain(),
                                [&](int64_t begin, int64_t end) { distances(c, i, begin, end, out + begin); });
  }
};

// A token that an approximate distance says may be the nearest.
struct Near {
  float distance;
  int32_t token;
};

// The exact distance of token i to the nearest of `near`, if that is less than `known`: those first that look nearest,
// until the others cannot be nearer.
float exact_nearest(const Tokens& tokens, float error, int64_t i, Near* near, int64_t count, float known) {
  std::vector<double> memory;
  const double* const center = tokens.center(i, memory);
  std::sort(near, near + count, [](const Near& a, const Near& b) { return a.distance < b.distance; });
  for (int64_t e = 0; e < count && known > 0 && near[e].distance - error < known; ++e) {
    float exact;
    tokens.distances(center, i, near[e].token, near[e].token + 1, &exact);
    known = std::min(known, exact);
  }
  return known;
}

struct Pick {
  int64_t token;
  float distance;
};

// ---- the first pick -------------------------------------------------------------------------------------------------

// The available token with the largest value, the first of equals.
template <class Value>
int64_t best_available(const Tokens& tokens, const Value& value) {
  int64_t best = -1;
  for (int64_t i = 0; i < tokens.rows.count; ++i)
    if (tokens.available[i] && (best < 0 || value(i) > value(best))) best = i;
  return best;
}

// The largest x[j] + y[j] of [begin, end), NaN left out; -inf of none.
float largest_sum(const float* x, const float* y, int64_t begin, int64_t end) {
  constexpr int64_t kSums = 16;
  float top[kSums];
  std::fill(top, top + kSums, -kInfinity);
  const auto offer = [&](int64_t lane, int64_t j) { top[lane] = x[j] + y[j] > top[lane] ? x[j] + y[j] : top[lane]; };
  int64_t j = begin;
  for (; j + kSums <= end; j += kSums)
    for (int64_t lane = 0; lane < kSums; ++lane) offer(lane, j + lane);
  for (; j < end; ++j) offer(0, j);
  return *std::max_element(top, top + kSums);
}

// From all cosines.
Pick isolated_compared(const Tokens& tokens) {
  const int64_t n = tokens.rows.count;
  std::vector<float> nearest(n), barred(n);
  for (int64_t j = 0; j < n; ++j) barred[j] = tokens.available[j] ? 0.0f : -kInfinity;
  torch::stable::parallel_for(0, n, 1 + (1 << 18) / (n + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* const cosines = tokens.cosines_of(i);
      const float before = largest_sum(cosines, barred.data(), 0, i);
      nearest[i] = 1.0f - std::max(before, largest_sum(cosines, barred.data(), i + 1, n));
    }
  });
  const int64_t pick = best_available(tokens, [&](int64_t i) { return nearest[i]; });
  return {pick, pick < 0 ? kNaN : nearest[pick]};
}

// Whether approximate distances to the nearest other tell so few tokens apart that exact ones of all pairs are cheaper.
bool too_close_to_call(const Tokens& tokens, const std::vector<float>& nearest, float error) {
  const int64_t n = tokens.rows.count, best = best_available(tokens, [&](int64_t i) { return nearest[i]; });
  int64_t in_doubt = 0;
  for (int64_t i = 0; i < n; ++i) in_doubt += tokens.available[i] && nearest[i] + 2 * error >= nearest[best];
  return in_doubt > n / 2;
}

// `compare`: all cosines may be made exactly.
Pick isolated(Tokens& tokens, Screen& screen, bool keep, bool compare) {
  const int64_t n = tokens.rows.count;
  const float error = screen.error();
  const std::vector<float> nearest = screen.nearest(keep);
  if (compare && too_close_to_call(tokens, nearest, error) && tokens.compare()) return isolated_compared(tokens);
  std::vector<float> upper(padded(n), -kInfinity);
  std::vector<bool> exact(n, false);
  for (int64_t i = 0; i < n; ++i)
    if (tokens.available[i]) upper[i] = nearest[i] + error;
  // The most isolated by its upper bound, as long as that is not exact.
  std::vector<Near> near;
  for (;;) {
    const int64_t i = tokens.kernels.first_largest(upper.data(), padded(n));
    if (i < 0) return {-1, kNaN};
    if (exact[i]) return {i, upper[i]};
    const float* const distance = screen.row(i, upper.data());
    near.clear();
    for (int64_t j = 0; j < n; ++j)
      if (j != i && distance[j] <= nearest[i] + 2 * error) near.push_back({distance[j], int32_t(j)});
    upper[i] = exact_nearest(tokens, error, i, near.data(), int64_t(near.size()), kInfinity);
    exact[i] = true;
  }
}

Pick isolated_exactly(const Tokens& tokens) {
  const int64_t n = tokens.rows.count;
  std::vector<std::vector<float>> found(workers());
  share_out(n, [&](int64_t worker, int64_t i) {
    std::vector<float>& nearest = found[worker];
    if (nearest.empty()) nearest.assign(n, kInfinity);
    if (!tokens.available[i]) return;
    std::vector<double> memory;
    std::vector<float> distance(n - i);
    tokens.distances(tokens.center(i, memory), i, i + 1, n, distance.data());
    for (int64_t j = i + 1; j < n; ++j) {
      if (!tokens.available[j]) continue;
      nearest[i] = std::min(nearest[i], distance[j - i - 1]);
      nearest[j] = std::min(nearest[j], distance[j - i - 1]);
    }
  });
  const auto value = [&](int64_t i) {
    float least = kInfinity;
    for (const std::vector<float>& one : found)
      if (!one.empty()) least = std::min(least, one[i]);
    return least;
  };
  const int64_t pick = best_available(tokens, value);
  return {pick, pick < 0 ? kNaN : value(pick)};
}

// ---- the others -----------------------------------------------------------------------------------------------------

// By exact distances of each pick to all tokens.
class ExactGreedy {
 public:
  ExactGreedy(Tokens& tokens, bool sum) : tokens_(tokens), sum_(sum), distance_(tokens.rows.count) {
    value_.assign(tokens.rows.count, sum ? 0.0 : double(kInfinity));
  }
  Pick next() const {
    const int64_t pick = best_available(tokens_, [&](int64_t i) { return value_[i]; });
    return {pick, pick < 0 ? kNaN : float(value_[pick])};
  }
  void picked(int64_t i) {
    tokens_.distances(i, distance_.data());
    for (size_t j = 0; j < value_.size(); ++j) {
      const double d = double(distance_[j]);
      value_[j] = sum_ ? value_[j] + d : std::min(value_[j], d);
    }
  }

 private:
  Tokens& tokens_;
  const bool sum_;
  std::vector<float> distance_;
  std::vector<double> value_;
};

// By approximate distances, made exact where that decides: of each token is known how far it is from the picks at most,
// and which picks may be nearer to it than its distance as far as that is exact.
class ScreenedGreedy {
 public:
  ScreenedGreedy(Tokens& tokens, Screen& screen)
      : tokens_(tokens),
        screen_(screen),
        n_(padded(tokens.rows.count)),
        upper_(n_, -kInfinity),
        exact_(n_, kInfinity),
        doubts_(n_),
        hits_(n_ + 1) {
    for (int64_t i = 0; i < tokens.rows.count; ++i)
      if (tokens.available[i]) upper_[i] = kInfinity;
  }
  // The token with the largest upper bound, as soon as that is exact: no other can be farther, nor as far with a lower
  // index.
  Pick next() {
    for (;;) {
      const int64_t i = tokens_.kernels.first_largest(upper_.data(), n_);
      if (i < 0) return {-1, kNaN};
      if (doubts_[i].count == 0) return {i, upper_[i]};
      resolve(i);
    }
  }
  void picked(int64_t i) {
    upper_[i] = -kInfinity;
    const float* const distance = screen_.row(i, upper_.data());
    const int64_t hits = tokens_.kernels.lower_bounds(distance, screen_.error(), n_, upper_.data(), hits_.data());
    for (int64_t h = 0; h < hits; ++h) {
      const int32_t j = hits_[h];
      Doubts& doubts = doubts_[j];
      if (doubts.count == kMostDoubts) drop(j);
      if (doubts.count == kMostDoubts) resolve(j);
      doubts.near[doubts.count++] = {distance[j], int32_t(i)};
      if (doubts.count == 1) upper_[j] = std::min(upper_[j], distance[j] + screen_.error());
    }
  }

 private:
  static constexpr int kMostDoubts = 8;
  struct Doubts {
    int32_t count = 0;
    Near near[kMostDoubts];
  };

  // Forgets the picks that are too far to be the nearest.
  void drop(int64_t i) {
    Doubts& doubts = doubts_[i];
    int32_t kept = 0;
    for (int32_t e = 0; e < doubts.count; ++e)
      if (doubts.near[e].distance - screen_.error() < upper_[i]) doubts.near[kept++] = doubts.near[e];
    doubts.count = kept;
  }
  void resolve(int64_t i) {
    Doubts& doubts = doubts_[i];
    exact_[i] = exact_nearest(tokens_, screen_.error(), i, doubts.near, doubts.count, exact_[i]);
    upper_[i] = exact_[i];
    doubts.count = 0;
  }

  Tokens& tokens_;
  Screen& screen_;
  const int64_t n_;
  std::vector<float> upper_;  // -inf where not available
  std::vector<float> exact_;  // distance to the picks of which that is known
  std::vector<Doubts> doubts_;
  std::vector<int32_t> hits_;
};

struct Request {
  CenterProblem problem;
  std::string start;
};

void pick_centers(const Request& request, const TokenRows& rows, const bool* mask, int64_t given, int64_t* index,
                  float* distance) {
  CenterProblem p = request.problem;
  CenterChoice choice = plan_k_center(p);
  Tokens tokens(pick_k_center_kernels(), rows, p.cosine, mask);
  if (choice.plan == CenterPlan::tiles && !tokens.compare()) {
    p.has_tiles = false;
    choice = plan_k_center(p);
  }
  std::optional<Screen> screen;
  const bool exact = choice.plan == CenterPlan::exact || choice.plan == CenterPlan::tiles;
  if (!exact || choice.screened_start)
    screen.emplace(tokens.kernels, rows, tokens.scales.data(), tokens.available.get(), choice.batch);

  Pick first{-1, kInfinity};
  if (p.isolated) {
    const bool keep = choice.plan == CenterPlan::gram;
    first = tokens.cosines          ? isolated_compared(tokens)
            : choice.screened_start ? isolated(tokens, *screen, keep, p.has_tiles && keep)
                                    : isolated_exactly(tokens);
  } else if (request.start == "norm") {
    first.token = best_available(tokens, [&](int64_t i) { return tokens.scales[i].length; });
  } else {
    first.token = best_available(tokens, [&](int64_t i) { return i == given; });
  }
  if (choice.plan == CenterPlan::gram && !p.isolated) screen->nearest(true);

  const auto run = [&](auto&& greedy) {
    int64_t step = 0;
    for (Pick pick = first; step < p.k && pick.token >= 0; pick = greedy.next()) {
      index[step] = pick.token;
      distance[step] = pick.distance;
      tokens.available[pick.token] = false;
      if (++step == p.k) break;
      greedy.picked(pick.token);
    }
    // Tokens that are not finite come last; then there are none.
    for (int64_t i = 0; i < rows.count && step < p.k; ++i) {
      if (tokens.scales[i].finite || (mask && !mask[i])) continue;
      index[step] = i;
      distance[step++] = kNaN;
    }
    std::fill(index + step, index + p.k, -1);
    std::fill(distance + step, distance + p.k, -kInfinity);
  };
  if (exact || tokens.cosines) {
    run(ExactGreedy(tokens, p.max_sum));
  } else {
    run(ScreenedGreedy(tokens, *screen));
  }
}

std::tuple<Tensor, Tensor> k_center(Tensor x, int64_t k, std::string metric, std::string objective, std::string start,
                                    std::optional<Tensor> first, std::optional<Tensor> mask,
                                    int64_t candidates_scored) {
  STD_TORCH_CHECK(x.dim() == 3, "x must be [B,N,D]");
  STD_TORCH_CHECK(metric == "cosine" || metric == "euclidean", "metric must be cosine or euclidean; got ", metric);
  STD_TORCH_CHECK(objective == "max_min" || objective == "max_sum", "objective must be max_min or max_sum; got ",
                  objective);
  STD_TORCH_CHECK(start == "isolated" || start == "norm" || start == "first" || (start == "given" && first.has_value()),
                  "start must be isolated, norm, first, or given with first; got ", start);
  const Dtype dtype = dtype_of(x, "x");
  x = with_dense_rows(x);
  const int64_t batch = x.size(0), n = x.size(1), width = x.size(2);
  STD_TORCH_CHECK(n < int64_t(1) << 31, "x has too many tokens: ", n);
  STD_TORCH_CHECK(k >= 0 && candidates_scored >= 0, "k and candidates_scored must not be negative");
  Tensor allowed, given;
  if (mask) {
    allowed = checked_contiguous(*mask, ScalarType::Bool, "mask");
    STD_TORCH_CHECK(allowed.numel() == batch * n, "mask must be [B,N]");
  }
  if (first) {
    given = checked_contiguous(*first, ScalarType::Long, "first");
    STD_TORCH_CHECK(given.numel() == batch, "first must be [B]");
  }
  const Tensor index = empty_like_device(x, {batch, k}, ScalarType::Long);
  const Tensor distance = empty_like_device(x, {batch, k}, ScalarType::Float);
  if (batch * k == 0) return {index, distance};

  const Request request{{n, width, k, metric == "cosine", objective == "max_sum", start == "isolated",
                         candidates_scored, exact_tiles_for(width) != nullptr},
                        start};
  const auto one = [&](int64_t b) {
    const char* const base =
        static_cast<const char*>(x.const_data_ptr()) + b * x.stride(0) * int64_t(element_size(dtype));
    pick_centers(request, {base, dtype, x.stride(1), n, width}, mask ? const_data<bool>(allowed) + b * n : nullptr,
                 start == "given" ? const_data<int64_t>(given)[b] : -1, data<int64_t>(index) + b * k,
                 data<float>(distance) + b * k);
  };
  if (batch >= workers()) {
    share_out(batch, [&](int64_t, int64_t b) { one(b); });
  } else {
    for (int64_t b = 0; b < batch; ++b) one(b);
  }
  return {index, distance};
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) { m.impl("k_center", TORCH_BOX(&fastok::k_center)); }
