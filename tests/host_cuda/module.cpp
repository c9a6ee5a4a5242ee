// fastok's CUDA kernels on the host SIMT machine, for Python. Pointers come as integers, strides in elements; shapes
// and dtypes are checked by the wrapper (__init__.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "match/match_launch.h"
#include "merge/merge_launch.h"

namespace py = pybind11;
using namespace fastok;
using namespace fastok::cuda;

namespace {

struct Array {
  uintptr_t data;
  std::vector<int64_t> shape, strides;

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
};
using Optional = std::optional<Array>;

Array array_of(const py::tuple& t) {
  return {t[0].cast<uintptr_t>(), t[1].cast<std::vector<int64_t>>(), t[2].cast<std::vector<int64_t>>()};
}
Optional optional_of(const py::object& t) { return t.is_none() ? Optional() : Optional(array_of(t.cast<py::tuple>())); }

Dtype dtype_of(const std::string& name) {
  return name == "float16"    ? Dtype::f16
         : name == "bfloat16" ? Dtype::bf16
         : name == "float64"  ? Dtype::f64
                              : Dtype::f32;
}

bool aligned(const Array& x, Dtype dtype) {
  return rows_aligned(x.as<void>(), x.strides[0], x.strides[1], 0, element_size(dtype));
}

BatchPositions positions_of(const Optional& list, int64_t n, int first) {
  if (!list) return {nullptr, 0, first, 2, int((n + 1 - first) / 2)};
  const bool shared = list->shape.size() == 1;
  return {list->as<int64_t>(), shared ? 0 : list->strides[0], 0, 1, int(list->shape.back())};
}

void bipartite_match(uint64_t seed, const std::string& dtype, const py::tuple& metric, int64_t r, int64_t protect,
                     std::optional<double> threshold, const py::object& bias, const py::object& src,
                     const py::object& dst, bool sorted_order, const py::tuple& assign, const py::tuple& counts,
                     const py::tuple& offsets, const py::tuple& members) {
  const Array x = array_of(metric), map = array_of(offsets);
  const Optional ranking = optional_of(bias);
  MatchParams p{};
  p.metric = x.as<void>(), p.batch_stride = x.strides[0], p.row_stride = x.strides[1];
  p.src = positions_of(optional_of(src), x.shape[1], 0);
  p.dst = positions_of(optional_of(dst), x.shape[1], 1);
  if (ranking)
    p.bias = ranking->as<float>(), p.bias_batch_stride = ranking->strides[0], p.bias_stride = ranking->strides[1];
  p.n = int(x.shape[1]), p.n_out = int(map.shape[1] - 1), p.r = int(r), p.protect = int(protect);
  p.by_threshold = threshold.has_value(), p.threshold = float(threshold.value_or(0)), p.sorted_order = sorted_order;
  p.shape.width = int(x.shape[2]);
  p.assign = array_of(assign).as<int32_t>(), p.counts = array_of(counts).as<int32_t>();
  p.offsets = map.as<int32_t>(), p.members = array_of(members).as<int32_t>();
  if (r <= 0 || p.src.count == 0 || p.dst.count == 0)
    return run_identity(simt::Launcher{seed}, x.shape[0], p.n, p.assign, p.counts, p.offsets, p.members);
  run_match(simt::Launcher{seed}, dtype_of(dtype), x.shape[0], aligned(x, dtype_of(dtype)), p);
}

void nearest(uint64_t seed, const std::string& dtype, const py::tuple& x_, const py::tuple& y_, int64_t k,
             const std::string& similarity, const py::object& mask_, const py::tuple& value, const py::tuple& index) {
  const Array x = array_of(x_), y = array_of(y_);
  const Optional mask = optional_of(mask_);
  const Dtype type = dtype_of(dtype);
  NearestParams p{};
  p.x = x.as<void>(), p.x_batch_stride = x.strides[0], p.x_row_stride = x.strides[1];
  p.y = y.as<void>(), p.y_batch_stride = y.strides[0], p.y_row_stride = y.strides[1];
  if (mask) p.mask = mask->as<bool>(), p.mask_batch_stride = mask->strides[0], p.mask_stride = mask->strides[1];
  p.n = int(x.shape[1]), p.m = int(y.shape[1]), p.width = int(x.shape[2]), p.k = int(k);
  p.similarity = similarity == "cosine" ? Similarity::cosine
                 : similarity == "dot"  ? Similarity::dot
                                        : Similarity::euclidean;
  p.value = array_of(value).as<float>(), p.index = array_of(index).as<int64_t>();
  run_nearest(simt::Launcher{seed}, type, x.shape[0], aligned(x, type) && aligned(y, type), p);
}

void build_map(uint64_t seed, const py::tuple& assign, int64_t n_out, const py::tuple& offsets,
               const py::tuple& members) {
  const Array slots = array_of(assign);
  run_build_map(simt::Launcher{seed}, slots.shape[0], slots.shape[1], n_out, slots.as<int32_t>(),
                array_of(offsets).as<int32_t>(), array_of(members).as<int32_t>());
}

// One of merge, backward, max_backward, unmerge; arrays that the op does not use are None.
void rows(uint64_t seed, const std::string& op, const std::string& dtype, const std::string& mode, int64_t n,
          int64_t n_out, int64_t channels, const py::tuple& assign, const py::tuple& offsets, const py::tuple& members,
          const py::dict& arrays) {
  MergeParams p{};
  bool all_aligned = true;
  const Dtype type = dtype_of(dtype);
  const auto tokens = [&](const char* name) -> TokenRows {
    const Optional x = arrays.contains(name) ? optional_of(arrays[name]) : Optional();
    if (!x) return {nullptr, 0, 0};
    all_aligned &= rows_aligned(x->as<void>(), x->strides[0], x->strides[1], channels, element_size(type));
    return {x->as<void>(), x->strides[0], x->strides[1]};
  };
  p.x = tokens("x"), p.y = tokens("y"), p.grad_y = tokens("grad_y"), p.grad_x = tokens("grad_x");
  p.residual = tokens("residual");
  if (arrays.contains("size"))
    if (const Optional size = optional_of(arrays["size"]))
      p.size = {size->as<float>(), size->strides[0], size->strides[1]};
  if (arrays.contains("size_out")) p.size_out = array_of(arrays["size_out"]).as<float>();
  p.mode = mode == "mean"  ? MergeMode::mean
           : mode == "sum" ? MergeMode::sum
           : mode == "max" ? MergeMode::max
                           : MergeMode::first;
  const Array slots = array_of(assign);
  p.batch = slots.shape[0], p.n = int(n), p.n_out = int(n_out), p.channels = int(channels);
  p.assign = slots.as<int32_t>(), p.offsets = array_of(offsets).as<int32_t>(),
  p.members = array_of(members).as<int32_t>();
  const RowOp which = op == "merge"          ? RowOp::merge
                      : op == "backward"     ? RowOp::backward
                      : op == "max_backward" ? RowOp::max_backward
                                             : RowOp::unmerge;
  run_rows(simt::Launcher{seed}, which, type, all_aligned, p);
}

}  // namespace

PYBIND11_MODULE(_host_cuda, m) {
  m.def("bipartite_match", &bipartite_match);
  m.def("nearest", &nearest);
  m.def("build_map", &build_map);
  m.def("rows", &rows);
}
