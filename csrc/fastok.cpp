// Every operator schema of fastok, and nothing else. Kernels register themselves per device next to their code;
// validation, fake kernels and autograd live in python/fastok/ops/.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fastok, m) {
  // Matching (csrc/match). A map is (assign[B,N], counts[B], offsets[B,M+1], members[B,N]), all int32.
  m.def(
      "bipartite_match(Tensor metric, SymInt r, SymInt protect, float? threshold, Tensor? bias, Tensor? src, "
      "Tensor? dst, bool sorted_order, bool static_shape) -> (Tensor assign, Tensor counts, Tensor offsets, "
      "Tensor members)");
  m.def("nearest(Tensor x, Tensor y, SymInt k, str similarity, Tensor? mask) -> (Tensor value, Tensor index)");

  // Merging (csrc/merge).
  m.def("build_map(Tensor assign, SymInt n_out) -> (Tensor offsets, Tensor members)");
  m.def(
      "merge(Tensor x, Tensor assign, Tensor offsets, Tensor members, Tensor? size, str mode) -> "
      "(Tensor y, Tensor size_out)");
  m.def(
      "merge_backward(Tensor grad_y, Tensor x, Tensor y, Tensor assign, Tensor offsets, Tensor members, "
      "Tensor? size, Tensor size_out, str mode) -> Tensor");
  m.def("unmerge(Tensor y, Tensor assign, Tensor offsets, Tensor members, Tensor? residual) -> Tensor");
}
