// CPU backend of top_tokens and sample_cdf: checks, sharing out, and selection by radix.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "select/select.h"

namespace fastok {
namespace {

// Which keys are the k lowest, equal ones by index: those below `key`, and the first `equal` that are equal to it.
struct Cut {
  uint32_t key = 0;
  int64_t equal = 0;

  bool take(uint32_t other) {
    if (other != key) return other < key;
    return equal > 0 && equal-- > 0;
  }
};

// By radix, from the highest digit; what shares the digits so far moves to `scratch`, which holds n.
Cut select_lowest(const uint32_t* keys, int64_t n, int64_t k, uint32_t* scratch) {
  if (k == 0) return {0, 0};
  if (k >= n) return {std::numeric_limits<uint32_t>::max(), 0};
  uint32_t prefix = 0, count[1 << 11];
  for (const int shift : {21, 10, 0}) {
    const uint32_t mask = shift > 0 ? (1 << 11) - 1 : (1 << 10) - 1;
    std::fill(count, count + mask + 1, 0);
    for (int64_t i = 0; i < n; ++i) ++count[keys[i] >> shift & mask];
    uint32_t digit = 0;
    while (k > count[digit]) k -= count[digit++];
    prefix |= digit << shift;
    const uint32_t next = prefix + (uint32_t(1) << shift);
    if (k == count[digit] && next > prefix) return {next, 0};
    int64_t kept = 0;
    for (int64_t i = 0; shift > 0 && i < n; ++i) {
      const uint32_t key = keys[i];
      scratch[kept] = key;
      kept += (key >> shift & mask) == digit;
    }
    keys = scratch, n = kept;
  }
  return {prefix, k};
}

// Where to put a token in an order by (key, index).
uint64_t ordered(uint32_t key, int64_t index) { return uint64_t(key) << 32 | uint64_t(index); }

// What one thread needs for rows of n scores in `segments` segments.
struct Workspace {
  std::vector<uint32_t> keys, scratch, bucket;
  std::vector<int64_t> start;
  std::vector<uint8_t> chosen;
  std::vector<uint64_t> order;

  Workspace(int64_t n, int64_t segments) : keys(n), scratch(n), start(segments + 2) {}
};

struct Request {
  int64_t n, protect, total;
  const std::vector<int64_t>& budgets;
  bool by_score;
};

// Marks each segment's best, then makes up the number from the others. Tokens of no segment get their key here.
void choose_in_segments(const Request& r, const int64_t* segment, int64_t stride, Workspace& w) {
  const int64_t n = r.n, segments = int64_t(r.budgets.size());
  const auto bucket_of = [&](int64_t i) { return w.keys[i] < kKeyUnscored ? segment[i * stride] : segments; };
  std::fill(w.start.begin(), w.start.end(), 0);
  for (int64_t i = r.protect; i < n; ++i) {
    const int64_t s = segment[i * stride];
    if (s < 0 || s >= segments) w.keys[i] = kKeyMasked;
    ++w.start[bucket_of(i) + 1];
  }
  for (int64_t s = 0; s <= segments; ++s) w.start[s + 1] += w.start[s];
  w.bucket.resize(n);
  std::vector<int64_t> next(w.start.begin(), w.start.end() - 1);
  for (int64_t i = r.protect; i < n; ++i) w.bucket[next[bucket_of(i)]++] = w.keys[i];

  std::vector<Cut> cuts(segments + 1);
  int64_t missing = r.total;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t begin = w.start[s], length = w.start[s + 1] - begin, k = std::min(r.budgets[s], length);
    cuts[s] = select_lowest(w.bucket.data() + begin, length, k, w.scratch.data());
    missing -= k;
  }
  w.chosen.assign(n, 0);
  int64_t rest = 0;
  for (int64_t i = r.protect; i < n; ++i) {
    w.chosen[i] = cuts[bucket_of(i)].take(w.keys[i]);
    if (!w.chosen[i]) w.bucket[rest++] = w.keys[i];
  }
  if (missing == 0) return;
  Cut cut = select_lowest(w.bucket.data(), rest, missing, w.scratch.data());
  for (int64_t i = r.protect; i < n; ++i) w.chosen[i] = w.chosen[i] || cut.take(w.keys[i]);
}

// Calls consume(token) for the chosen ones, ascending.
template <class Consume>
void for_chosen(const Request& r, const int64_t* segment, int64_t stride, Workspace& w, const Consume& consume) {
  if (segment) {
    choose_in_segments(r, segment, stride, w);
    for (int64_t i = r.protect; i < r.n; ++i)
      if (w.chosen[i]) consume(i);
    return;
  }
  Cut cut = select_lowest(w.keys.data() + r.protect, r.n - r.protect, r.total, w.scratch.data());
  int64_t left = r.total;
  for (int64_t i = r.protect; left > 0; ++i) {
    if (!cut.take(w.keys[i])) continue;
    consume(i);
    --left;
  }
}

void top_row(const Request& r, const int64_t* segment, int64_t stride, Workspace& w, int64_t* out) {
  for (int64_t i = 0; i < r.protect; ++i) *out++ = i;
  if (!r.by_score) {
    for_chosen(r, segment, stride, w, [&](int64_t i) { *out++ = i; });
    return;
  }
  w.order.clear();
  for_chosen(r, segment, stride, w, [&](int64_t i) { w.order.push_back(ordered(w.keys[i], i)); });
  std::sort(w.order.begin(), w.order.end());
  for (const uint64_t key : w.order) *out++ = int64_t(uint32_t(key));
}

Tensor top_tokens(Tensor scores, std::vector<int64_t> k, int64_t protect, std::optional<Tensor> mask,
                  std::optional<Tensor> segments, bool by_score) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores must be [B,N]");
  const Dtype dtype = dtype_of(scores, "scores");
  const int64_t batch = scores.size(0), n = scores.size(1);
  int64_t total = 0;
  for (const int64_t budget : k) {
    STD_TORCH_CHECK(budget >= 0, "k must be >= 0, got ", budget);
    total += budget;
  }
  STD_TORCH_CHECK(protect >= 0 && total <= n - protect, "protect + k must be within [0, N=", n, "], got ", protect,
                  " + ", total);
  STD_TORCH_CHECK(segments || k.size() == 1, "k must be one budget without segments, got ", k.size());
  STD_TORCH_CHECK(n < int64_t(1) << 32, "scores has too many tokens: ", n);
  const auto check = [&](const Tensor& x, ScalarType wanted, const char* name) {
    STD_TORCH_CHECK(x.scalar_type() == wanted, name, " has the wrong dtype");
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == batch && x.size(1) == n, name, " must be [B,N]");
  };
  if (mask) check(*mask, ScalarType::Bool, "mask");
  if (segments) check(*segments, ScalarType::Long, "segments");

  const Tensor index = empty_like_device(scores, {batch, protect + total}, ScalarType::Long);
  if (protect + total == 0) return index;
  const SelectKernels& kernels = pick_select_kernels();
  const Request request{n, protect, total, k, by_score};
  const char* base = static_cast<const char*>(scores.const_data_ptr());
  torch::stable::parallel_for(0, batch, 1 + 2048 / (n + 1), [&](int64_t begin, int64_t end) {
    Workspace w(n, int64_t(k.size()));
    for (int64_t b = begin; b < end; ++b) {
      kernels.keys(dtype, base + b * scores.stride(0) * int64_t(element_size(dtype)), scores.stride(1), n,
                   w.keys.data());
      if (mask) {
        const bool* allowed = const_data<bool>(*mask) + b * mask->stride(0);
        for (int64_t i = 0; i < n; ++i)
          if (!allowed[i * mask->stride(1)]) w.keys[i] = kKeyMasked;
      }
      const int64_t* segment = segments ? const_data<int64_t>(*segments) + b * segments->stride(0) : nullptr;
      top_row(request, segment, segments ? segments->stride(1) : 0, w, data<int64_t>(index) + b * (protect + total));
    }
  });
  return index;
}

// ---- sample_cdf -----------------------------------------------------------------------------------------------------

// Inclusive sums by doubling: the order of the additions is the same on every backend.
void prefix_sums(double* x, int64_t n) {
  for (int64_t step = 1; step < n; step *= 2)
    for (int64_t i = n - 1; i >= step; --i) x[i] += x[i - step];
}

// The ranks, among `n` ascending cumulative sums above the least, that `heights` evenly spaced heights are nearest to.
void pick_ranks(const double* total, int64_t n, int64_t heights, uint8_t* picked) {
  const double high = total[n - 1];
  const double low = *std::upper_bound(total, total + n - 1, 0.0);
  const auto height_of = [&](int64_t step) {
    return low + (high - low) * double(step) / double(std::max<int64_t>(heights - 1, 1));
  };
  if (heights <= n) {
    for (int64_t step = 0; step < heights; ++step) {
      const double height = height_of(step);
      const int64_t above = std::min<int64_t>(std::lower_bound(total, total + n, height) - total, n - 1);
      const int64_t below = std::max<int64_t>(above - 1, 0);
      picked[height - total[below] <= total[above] - height ? below : above] = 1;
    }
    return;
  }
  // Heights ascend and so do their ranks: each rank has those from its first one up to the first of the next rank.
  for (int64_t rank = 0, first = 0; rank < n; ++rank) {
    int64_t next = first, end = heights;
    while (next < end) {
      const int64_t middle = next + (end - next) / 2;
      const double height = height_of(middle);
      if (rank + 1 < n && height - total[rank] > total[rank + 1] - height) {
        end = middle;
      } else {
        next = middle + 1;
      }
    }
    picked[rank] = first < next;
    first = next;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_cdf(Tensor scores, int64_t k, int64_t protect) {
  STD_TORCH_CHECK(scores.dim() == 2, "scores must be [B,N]");
  const Dtype dtype = dtype_of(scores, "scores");
  const int64_t batch = scores.size(0), n = scores.size(1), n_out = std::min(k, n), heights = k - protect;
  STD_TORCH_CHECK(protect >= 0 && protect <= n && heights >= 0, "protect must be within [0, N] and [0, k], got ",
                  protect);
  STD_TORCH_CHECK(n < int64_t(1) << 31, "scores has too many tokens: ", n);
  const Tensor assign = empty_like_device(scores, {batch, n}, ScalarType::Int);
  const Tensor counts = empty_like_device(scores, {batch}, ScalarType::Int);
  const Tensor offsets = empty_like_device(scores, {batch, n_out + 1}, ScalarType::Int);
  const Tensor members = empty_like_device(scores, {batch, n}, ScalarType::Int);
  const SelectKernels& kernels = pick_select_kernels();
  const char* base = static_cast<const char*>(scores.const_data_ptr());

  torch::stable::parallel_for(0, batch, 1 + 1024 / (n + 1), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys(n);
    std::vector<uint64_t> order;
    std::vector<double> total;
    std::vector<uint8_t> picked;
    for (int64_t b = begin; b < end; ++b) {
      kernels.keys(dtype, base + b * scores.stride(0) * int64_t(element_size(dtype)), scores.stride(1), n, keys.data());

      // Tokens by ascending significance; what is below 0 or infinite counts as the nearest that is allowed.
      const uint32_t zero = 0x7fffffffu, largest = 0x00800000u;
      order.clear();
      for (int64_t i = protect; i < n; ++i)
        if (keys[i] != kKeyUnscored) order.push_back(ordered(~std::clamp(keys[i], largest, zero), i));
      std::sort(order.begin(), order.end());
      const int64_t ranks = int64_t(order.size());
      total.resize(ranks);
      for (int64_t i = 0; i < ranks; ++i) {
        const uint32_t bits = uint32_t(order[i] >> 32) & 0x7fffffffu;
        float score;
        std::memcpy(&score, &bits, sizeof score);
        total[i] = score;
      }
      prefix_sums(total.data(), ranks);
      const bool nothing = ranks > 0 && total[ranks - 1] - total[0] == 0;
      const double least = ranks > 0 ? total[0] : 0;
      for (int64_t i = 0; i < ranks; ++i) total[i] = nothing ? double(i) : total[i] - least;
      picked.assign(ranks, 0);
      if (ranks > 0 && heights > 0) pick_ranks(total.data(), ranks, heights, picked.data());

      int32_t* slot = data<int32_t>(assign) + b * n;
      int32_t* member = data<int32_t>(members) + b * n;
      int32_t* start = data<int32_t>(offsets) + b * (n_out + 1);
      std::fill(slot, slot + n, -1);
      std::fill(member, member + n, -1);
      int32_t used = 0;
      const auto keep = [&](int64_t token) {
        slot[token] = used;
        member[used++] = int32_t(token);
      };
      for (int64_t i = 0; i < protect; ++i) keep(i);
      for (int64_t i = 0; i < ranks; ++i)
        if (picked[i]) keep(int64_t(uint32_t(order[i])));
      data<int32_t>(counts)[b] = used;
      for (int64_t s = 0; s <= n_out; ++s) start[s] = std::min(int32_t(s), used);
    }
  });
  return {assign, counts, offsets, members};
}

}  // namespace

void top_by_score(const uint32_t* keys, int64_t n, int64_t k, int64_t* out) {
  const std::vector<int64_t> budgets{k};
  Workspace w(n, 1);
  std::copy(keys, keys + n, w.keys.begin());
  top_row({n, 0, k, budgets, true}, nullptr, 0, w, out);
}

}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) {
  m.impl("top_tokens", TORCH_BOX(&fastok::top_tokens));
  m.impl("sample_cdf", TORCH_BOX(&fastok::sample_cdf));
}
