// CPU backend of build_map, merge, merge_backward and unmerge: checks and sharing out; the cores are in merge_simd.cpp.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "common/tensor.h"
#include "merge/merge.h"

namespace fastok {

void build_csr(const int32_t* assign, int64_t batch, int64_t n, int64_t n_out, int32_t* offsets, int32_t* members) {
  const int64_t grain = 1 + 8192 / (n + n_out + 1);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> next(n_out);
    for (int64_t b = begin; b < end; ++b) {
      const int32_t* slot = assign + b * n;
      int32_t* start = offsets + b * (n_out + 1);
      std::fill(start, start + n_out + 1, 0);
      for (int64_t i = 0; i < n; ++i)
        if (slot[i] >= 0) ++start[slot[i] + 1];
      for (int64_t s = 0; s < n_out; ++s) start[s + 1] += start[s];
      std::copy(start, start + n_out, next.begin());
      int32_t* member = members + b * n;
      for (int64_t i = 0; i < n; ++i)
        if (slot[i] >= 0) member[next[slot[i]]++] = int32_t(i);
      std::fill(member + start[n_out], member + n, -1);
    }
  });
}

namespace {

// Bytes that are worth handing to another thread; and that are more than a machine's caches will keep for the next op.
constexpr int64_t kGrainBytes = 32 << 10, kPastCachesBytes = 16 << 20, kCacheLine = 64;

int64_t grain_of(int64_t channels, Dtype dtype) {
  return 1 + kGrainBytes / (channels * int64_t(element_size(dtype)) + 1);
}

Tokens tokens(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

MergeMode mode_of(const std::string& mode) {
  if (mode == "mean") return MergeMode::mean;
  if (mode == "sum") return MergeMode::sum;
  if (mode == "max") return MergeMode::max;
  STD_TORCH_CHECK(mode == "first", "mode must be mean, sum, max or first; got ", mode);
  return MergeMode::first;
}

// A map whose shapes are checked. Its values are trusted: TokenMap checks them where they come from a user.
struct CheckedMap {
  Tensor assign, offsets, members;
  TokenMapView view;

  CheckedMap(const Tensor& assign_in, const Tensor& offsets_in, const Tensor& members_in)
      : assign(checked_contiguous(assign_in, ScalarType::Int, "assign")),
        offsets(checked_contiguous(offsets_in, ScalarType::Int, "offsets")),
        members(checked_contiguous(members_in, ScalarType::Int, "members")) {
    STD_TORCH_CHECK(assign.dim() == 2 && offsets.dim() == 2 && members.dim() == 2 &&
                        members.size(0) == assign.size(0) && members.size(1) == assign.size(1) &&
                        offsets.size(0) == assign.size(0) && offsets.size(1) >= 1,
                    "assign and members must be [B,N], offsets [B,M+1]");
    view = {const_data<int32_t>(assign), const_data<int32_t>(offsets), const_data<int32_t>(members), assign.size(1),
            offsets.size(1) - 1};
  }
  int64_t batch() const { return assign.size(0); }
};

void check_tokens(const Tensor& x, int64_t batch, int64_t rows, const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch && x.size(1) == rows, name, " does not fit the token map");
}

Tensor checked_size(const Tensor& size, const CheckedMap& map) {
  const Tensor dense = checked_contiguous(size, ScalarType::Float, "size");
  STD_TORCH_CHECK(dense.numel() == map.batch() * map.view.n, "size must be [B,N]");
  return dense;
}

std::tuple<Tensor, Tensor> build_map(Tensor assign, int64_t n_out) {
  const Tensor dense = checked_contiguous(assign, ScalarType::Int, "assign");
  STD_TORCH_CHECK(dense.dim() == 2 && n_out >= 0, "assign must be [B,N] and n_out >= 0");
  const int64_t batch = dense.size(0), n = dense.size(1);
  const int32_t* slots = const_data<int32_t>(dense);
  const bool fits = std::all_of(slots, slots + batch * n, [&](int32_t s) { return s < n_out; });
  STD_TORCH_CHECK(fits, "assign must be below n_out=", n_out);
  const Tensor offsets = empty_like_device(dense, {batch, n_out + 1}, ScalarType::Int);
  const Tensor members = empty_like_device(dense, {batch, n}, ScalarType::Int);
  build_csr(slots, batch, n, n_out, data<int32_t>(offsets), data<int32_t>(members));
  return {offsets, members};
}

std::tuple<Tensor, Tensor> merge(Tensor x, Tensor assign, Tensor offsets, Tensor members, std::optional<Tensor> size,
                                 std::string mode) {
  const CheckedMap map(assign, offsets, members);
  check_tokens(x, map.batch(), map.view.n, "x");
  const Dtype dtype = dtype_of(x, "x", true);
  const MergeMode merge_mode = mode_of(mode);
  x = with_dense_rows(x);
  Tensor sizes;
  if (size) sizes = checked_size(*size, map);
  const int64_t channels = x.size(2), rows = map.batch() * map.view.n_out;
  const Tensor y = empty_like_device(x, {map.batch(), map.view.n_out, channels}, x.scalar_type());
  const Tensor size_out = empty_like_device(x, {map.batch(), map.view.n_out}, ScalarType::Float);
  const float* weights = size ? const_data<float>(sizes) : nullptr;
  const Tokens source = tokens(x), target = tokens(y);
  float* totals = data<float>(size_out);
  const int64_t row_bytes = channels * int64_t(element_size(dtype));
  const bool past_caches = rows * row_bytes >= kPastCachesBytes && row_bytes % kCacheLine == 0 &&
                           reinterpret_cast<uintptr_t>(target.data) % kCacheLine == 0;
  const MergeKernels& kernels = pick_merge_kernels();
  torch::stable::parallel_for(0, rows, grain_of(channels, dtype), [&](int64_t begin, int64_t end) {
    kernels.merge(dtype, merge_mode, map.view, source, weights, target, totals, channels, past_caches, begin, end);
  });
  return {y, size_out};
}

Tensor merge_backward(Tensor grad_y, Tensor x, Tensor y, Tensor assign, Tensor offsets, Tensor members,
                      std::optional<Tensor> size, Tensor size_out, std::string mode) {
  const CheckedMap map(assign, offsets, members);
  check_tokens(x, map.batch(), map.view.n, "x");
  check_tokens(y, map.batch(), map.view.n_out, "y");
  check_tokens(grad_y, map.batch(), map.view.n_out, "grad_y");
  const Dtype dtype = dtype_of(x, "x", true);
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && y.scalar_type() == x.scalar_type(),
                  "grad_y, x and y must have the same dtype");
  const MergeMode merge_mode = mode_of(mode);
  grad_y = with_dense_rows(grad_y);
  x = with_dense_rows(x);
  y = with_dense_rows(y);
  const int64_t channels = x.size(2);
  STD_TORCH_CHECK(grad_y.size(2) == channels && y.size(2) == channels, "grad_y, x and y must have the same width");
  Tensor sizes;
  if (size) sizes = checked_size(*size, map);
  const Tensor totals = checked_contiguous(size_out, ScalarType::Float, "size_out");
  STD_TORCH_CHECK(totals.numel() == map.batch() * map.view.n_out, "size_out must be [B,M]");
  const Tensor grad_x = empty_like_device(x, {map.batch(), map.view.n, channels}, x.scalar_type());
  const Tokens grad_in = tokens(grad_y), source = tokens(x), top = tokens(y), grad_out = tokens(grad_x);
  const int64_t grain = grain_of(channels, dtype);
  const MergeKernels& kernels = pick_merge_kernels();
  if (merge_mode == MergeMode::max) {
    std::fill_n(static_cast<char*>(grad_x.mutable_data_ptr()), grad_x.numel() * int64_t(element_size(dtype)), 0);
    torch::stable::parallel_for(0, map.batch() * map.view.n_out, grain, [&](int64_t begin, int64_t end) {
      kernels.max_backward(dtype, map.view, grad_in, source, top, grad_out, channels, begin, end);
    });
  } else {
    torch::stable::parallel_for(0, map.batch() * map.view.n, grain, [&](int64_t begin, int64_t end) {
      kernels.backward(dtype, merge_mode, map.view, grad_in, size ? const_data<float>(sizes) : nullptr,
                       const_data<float>(totals), grad_out, channels, begin, end);
    });
  }
  return grad_x;
}

Tensor unmerge(Tensor y, Tensor assign, Tensor offsets, Tensor members, std::optional<Tensor> residual) {
  const CheckedMap map(assign, offsets, members);
  check_tokens(y, map.batch(), map.view.n_out, "y");
  const Dtype dtype = dtype_of(y, "y", true);
  y = with_dense_rows(y);
  const int64_t channels = y.size(2);
  Tokens added{nullptr, 0, 0};
  Tensor extra;
  if (residual) {
    STD_TORCH_CHECK(residual->scalar_type() == y.scalar_type(), "residual must have the dtype of y");
    check_tokens(*residual, map.batch(), map.view.n, "residual");
    STD_TORCH_CHECK(residual->size(2) == channels, "residual must be as wide as y");
    extra = with_dense_rows(*residual);
    added = tokens(extra);
  }
  const Tensor out = empty_like_device(y, {map.batch(), map.view.n, channels}, y.scalar_type());
  const Tokens source = tokens(y), target = tokens(out);
  const MergeKernels& kernels = pick_merge_kernels();
  torch::stable::parallel_for(0, map.batch() * map.view.n, grain_of(channels, dtype), [&](int64_t begin, int64_t end) {
    kernels.unmerge(dtype, map.view, source, added, target, channels, begin, end);
  });
  return out;
}

}  // namespace
}  // namespace fastok

STABLE_TORCH_LIBRARY_IMPL(fastok, CPU, m) {
  m.impl("build_map", TORCH_BOX(&fastok::build_map));
  m.impl("merge", TORCH_BOX(&fastok::merge));
  m.impl("merge_backward", TORCH_BOX(&fastok::merge_backward));
  m.impl("unmerge", TORCH_BOX(&fastok::unmerge));
}
