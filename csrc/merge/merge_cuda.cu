// CUDA backend of build_map, merge, merge_backward and unmerge: checks and launches. Kernels are in merge_kernel.cuh.
#include <string>
#include <tuple>

#include "common/launch.h"
#include "merge/merge_launch.h"

namespace fastok::cuda {
namespace {

MergeMode mode_of(const std::string& mode) {
  if (mode == "mean") return MergeMode::mean;
  if (mode == "sum") return MergeMode::sum;
  if (mode == "max") return MergeMode::max;
  STD_TORCH_CHECK(mode == "first", "mode must be mean, sum, max or first, got ", mode);
  return MergeMode::first;
}

// The map as the kernels take it. Its tensors must outlive the launch's argument list only: torch's allocator keeps the
// memory for work already on the stream.
struct Map {
  Tensor assign, offsets, members;

  Map(const Tensor& like, const char* like_name, const Tensor& assign_, const Tensor& offsets_, const Tensor& members_)
      : assign(checked_contiguous(assign_, ScalarType::Int, "assign")),
        offsets(checked_contiguous(offsets_, ScalarType::Int, "offsets")),
        members(checked_contiguous(members_, ScalarType::Int, "members")) {
    STD_TORCH_CHECK(like.dim() == 3, like_name, " must have three dimensions");
    STD_TORCH_CHECK(assign.dim() == 2, "assign must be [B,N]");
    STD_TORCH_CHECK(offsets.dim() == 2 && offsets.size(0) == assign.size(0) && offsets.size(1) > 0,
                    "offsets must be [B,M+1]");
    check_shape(members, "members", {assign.size(0), assign.size(1)});
    check_on_device(assign, "assign", like, like_name);
    check_on_device(offsets, "offsets", like, like_name);
    check_on_device(members, "members", like, like_name);
    check_countable(assign.size(1), "N");
    check_countable(offsets.size(1), "M");
    check_countable(like.size(2), "C");
  }
  int64_t batch() const { return assign.size(0); }
  int64_t n() const { return assign.size(1); }
  int64_t n_out() const { return offsets.size(1) - 1; }

  MergeParams params(MergeMode mode, int64_t channels) const {
    MergeParams p{};
    p.mode = mode;
    p.batch = batch(), p.n = int(n()), p.n_out = int(n_out()), p.channels = int(channels);
    p.assign = const_data<int32_t>(assign), p.offsets = const_data<int32_t>(offsets);
    p.members = const_data<int32_t>(members);
    return p;
  }
};

// Collects the arrays of rows of an op, and whether all of them can be moved 16 bytes at a time.
struct RowArrays {
  Dtype dtype;
  bool aligned = true;

  TokenRows add(const Tensor& x) {
    const auto data = const_cast<void*>(x.const_data_ptr());
    aligned &= rows_aligned(data, x.stride(0), x.stride(1), x.size(2), element_size(dtype));
    return {data, x.stride(0), x.stride(1)};
  }
  TokenRows add(Tensor& result) {
    aligned &= rows_aligned(result.mutable_data_ptr(), result.stride(0), result.stride(1), result.size(2),
                            element_size(dtype));
    return {result.mutable_data_ptr(), result.stride(0), result.stride(1)};
  }
};

Sizes sizes_of(const std::optional<Tensor>& size, const Map& map) {
  if (!size) return {nullptr, 0, 0};
  STD_TORCH_CHECK(size->scalar_type() == ScalarType::Float, "size must be float32");
  check_shape(*size, "size", {map.batch(), map.n()});
  check_on_device(*size, "size", map.assign, "assign");
  return {const_data<float>(*size), size->stride(0), size->stride(1)};
}

// `x` fit for a kernel: of the given shape and dtype, the last dimension contiguous.
Tensor checked_rows(const Tensor& x, const char* name, std::initializer_list<int64_t> shape, const Tensor& like) {
  check_shape(x, name, shape);
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " has the wrong dtype");
  check_on_device(x, name, like, "the other arguments");
  return with_dense_rows(x);
}

std::tuple<Tensor, Tensor> build_map(Tensor assign, int64_t n_out) {
  STD_TORCH_CHECK(assign.dim() == 2, "assign must be [B,N]");
  STD_TORCH_CHECK(n_out >= 0, "n_out must not be negative, got ", n_out);
  const int64_t batch = assign.size(0), n = assign.size(1);
  check_countable(n, "N");
  check_countable(n_out, "n_out");
  check_grid(batch, "B");
  const Tensor slots = checked_contiguous(assign, ScalarType::Int, "assign");
  const Tensor offsets = empty_like_device(assign, {batch, n_out + 1}, ScalarType::Int);
  const Tensor members = empty_like_device(assign, {batch, n}, ScalarType::Int);
  if (batch > 0)
    run_build_map(Launcher(assign), batch, n, n_out, const_data<int32_t>(slots), data<int32_t>(offsets),
                  data<int32_t>(members));
  return {offsets, members};
}

std::tuple<Tensor, Tensor> merge(Tensor x, Tensor assign, Tensor offsets, Tensor members, std::optional<Tensor> size,
                                 std::string mode) {
  RowArrays rows{dtype_of(x, "x", true)};
  const Map map(x, "x", assign, offsets, members);
  const Tensor source = checked_rows(x, "x", {map.batch(), map.n(), x.size(2)}, x);
  Tensor y = empty_like_device(x, {map.batch(), map.n_out(), x.size(2)}, x.scalar_type());
  const Tensor size_out = empty_like_device(x, {map.batch(), map.n_out()}, ScalarType::Float);
  MergeParams p = map.params(mode_of(mode), x.size(2));
  p.x = rows.add(source), p.y = rows.add(y);
  p.size = sizes_of(size, map), p.size_out = data<float>(size_out);
  if (size_out.numel() > 0) run_rows(Launcher(x), RowOp::merge, rows.dtype, rows.aligned, p);
  return {y, size_out};
}

Tensor merge_backward(Tensor grad_y, Tensor x, Tensor y, Tensor assign, Tensor offsets, Tensor members,
                      std::optional<Tensor> size, Tensor size_out, std::string mode) {
  RowArrays rows{dtype_of(x, "x", true)};
  const Map map(x, "x", assign, offsets, members);
  const int64_t channels = x.size(2);
  const Tensor grad = checked_rows(grad_y, "grad_y", {map.batch(), map.n_out(), channels}, x);
  const Tensor source = checked_rows(x, "x", {map.batch(), map.n(), channels}, x);
  const Tensor merged = checked_rows(y, "y", {map.batch(), map.n_out(), channels}, x);
  const Tensor totals = checked_contiguous(size_out, ScalarType::Float, "size_out");
  check_shape(totals, "size_out", {map.batch(), map.n_out()});
  check_on_device(totals, "size_out", x, "x");
  Tensor grad_x = empty_like_device(x, {map.batch(), map.n(), channels}, x.scalar_type());

  MergeParams p = map.params(mode_of(mode), channels);
  const bool max = p.mode == MergeMode::max;
  p.grad_y = rows.add(grad), p.grad_x = rows.add(grad_x);
  if (max) p.x = rows.add(source), p.y = rows.add(merged);
  p.size = sizes_of(size, map), p.size_out = const_cast<float*>(const_data<float>(totals));
  if (grad_x.numel() > 0)
    run_rows(Launcher(x), max ? RowOp::max_backward : RowOp::backward, rows.dtype, rows.aligned, p);
  return grad_x;
}

Tensor unmerge(Tensor y, Tensor assign, Tensor offsets, Tensor members, std::optional<Tensor> residual) {
  RowArrays rows{dtype_of(y, "y", true)};
  const Map map(y, "y", assign, offsets, members);
  const int64_t channels = y.size(2);
  const Tensor source = checked_rows(y, "y", {map.batch(), map.n_out(), channels}, y);
  const Tensor more = residual ? checked_rows(*residual, "residual", {map.batch(), map.n(), channels}, y) : source;
  Tensor out = empty_like_device(y, {map.batch(), map.n(), channels}, y.scalar_type());
  MergeParams p = map.params(MergeMode::sum, channels);
  p.y = rows.add(source), p.x = rows.add(out);
  if (residual) p.residual = rows.add(more);
  if (out.numel() > 0) run_rows(Launcher(y), RowOp::unmerge, rows.dtype, rows.aligned, p);
  return out;
}

}  // namespace
}  // namespace fastok::cuda

STABLE_TORCH_LIBRARY_IMPL(fastok, CUDA, m) {
  m.impl("build_map", TORCH_BOX(&fastok::cuda::build_map));
  m.impl("merge", TORCH_BOX(&fastok::cuda::merge));
  m.impl("merge_backward", TORCH_BOX(&fastok::cuda::merge_backward));
  m.impl("unmerge", TORCH_BOX(&fastok::cuda::unmerge));
}
