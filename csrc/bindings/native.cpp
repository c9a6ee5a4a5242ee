// fastok._native: build information, control of the instruction set and the CUDA planners, for `fastok info` and for
// tests. Nothing needs it at run time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "attention/attention_sm90.h"
#include "cpu/dispatch.h"
#include "k_center/k_center.h"
#include "max_coverage/max_coverage.h"

namespace {

using fastok::Isa;

const std::pair<const char*, Isa> kIsas[] = {{"baseline", Isa::baseline},
                                             {"avx2", Isa::avx2},
                                             {"avx512", Isa::avx512},
                                             {"avx512_bf16", Isa::avx512_bf16},
                                             {"amx", Isa::amx}};

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const auto& [name, isa] : kIsas)
    if (fastok::has_isa(isa)) names.emplace_back(name);
  return names;
}

std::string active_isa() {
  for (const auto& [name, isa] : kIsas)
    if (isa == fastok::active_isa()) return name;
  return "unknown";
}

void set_isa(const std::string& wanted) {
  for (const auto& [name, isa] : kIsas)
    if (wanted == name && fastok::set_isa(isa)) return;
  throw pybind11::value_error("isa must be one that this machine has (see available_isas()), got '" + wanted + "'");
}

namespace sm90 = fastok::cuda::sm90;

std::string attention_kernel(int capability, int64_t n_q, int64_t n_k, int64_t width, int64_t v_width,
                             size_t element_size, double scale, double softcap) {
  return sm90::serves_forward({capability, n_q, n_k, width, v_width, element_size, scale, softcap}) ? "sm90" : "mma";
}

std::string scores_kernel(int capability, int64_t n_rows, int64_t n_k, int64_t width, size_t element_size, double scale,
                          double softcap, const std::string& reduce, bool logits, bool listed, bool by_row) {
  const auto rows = reduce == "sum"   ? fastok::cuda::ScoreReduce::sum
                    : reduce == "max" ? fastok::cuda::ScoreReduce::max
                                      : fastok::cuda::ScoreReduce::none;
  const sm90::Problem problem{capability, n_rows, n_k, width, 0, element_size, scale, softcap};
  return sm90::serves_scores(problem, rows, logits, listed, by_row) ? "sm90" : "mma";
}

std::tuple<std::string, int64_t, bool> plan_k_center(int64_t n, int64_t width, int64_t k, const std::string& metric,
                                                     const std::string& objective, const std::string& start,
                                                     int64_t candidates_scored, bool tiles) {
  const fastok::CenterChoice choice = fastok::plan_k_center(
      {n, width, k, metric == "cosine", objective == "max_sum", start == "isolated", candidates_scored, tiles});
  constexpr const char* kNames[] = {"exact", "tiles", "gram", "batches"};
  return {kNames[static_cast<int>(choice.plan)], choice.batch, choice.screened_start};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information and instruction-set control of the fastok CPU library.";
  m.def("available_isas", &available_isas, "Instruction sets this machine has kernels for, slowest first.");
  m.def("active_isa", &active_isa, "The instruction set in use.");
  m.def("set_isa", &set_isa, pybind11::arg("isa"), "Use another instruction set from available_isas().");
  m.def("reads_one_stream", &fastok::reads_one_stream, "Whether dense caches are read in one stream, not in several.");
  m.def("set_one_stream", &fastok::set_one_stream, pybind11::arg("one"), "Read them so, or not.");
  using pybind11::arg;
  m.def("attention_kernel", &attention_kernel, arg("capability"), arg("n_q"), arg("n_k"), arg("width"), arg("v_width"),
        arg("element_size"), arg("scale"), arg("softcap"),
        "Which kernels of libfastok_cuda serve attention: 'sm90' or 'mma'. Lengths are a sequence's, -1: not known.");
  m.def("scores_kernel", &scores_kernel, arg("capability"), arg("n_rows"), arg("n_k"), arg("width"),
        arg("element_size"), arg("scale"), arg("softcap"), arg("reduce"), arg("logits"), arg("listed"), arg("by_row"),
        "The same for attention_scores. by_row: heads are reduced within each row, before rows are.");
  m.def("plan_k_center", &plan_k_center, pybind11::arg("n"), pybind11::arg("width"), pybind11::arg("k"),
        pybind11::arg("metric") = "cosine", pybind11::arg("objective") = "max_min", pybind11::arg("start") = "isolated",
        pybind11::arg("candidates_scored") = 0, pybind11::arg("tiles") = false,
        "How k_center finds picks on the CPU: the plan, candidates scored at once, whether the start is screened.");
  m.def("plan_kept_columns", &fastok::plan_kept_columns, pybind11::arg("rows"), pybind11::arg("n"),
        "How many columns of a pair's similarities max_coverage keeps.");
  m.def("coverage_exponent", &fastok::coverage_exponent, pybind11::arg("rows"), pybind11::arg("peak_exponent"),
        "max_coverage counts similarities in units of 2 to minus this.");
  m.attr("compiler") = std::string(FASTOK_COMPILER);
  m.attr("torch_built_against") = std::string(FASTOK_TORCH_VERSION);
}
