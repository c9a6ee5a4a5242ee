// fastok._native: build information and control of the instruction set, for `fastok info` and for tests.
// Nothing needs it at run time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

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

std::tuple<std::string, int64_t, bool> plan_k_center(int64_t n, int64_t width, int64_t k, const std::string& metric,
                                                     const std::string& objective, const std::string& start,
                                                     int64_t candidates_scored) {
  const fastok::CenterChoice choice = fastok::plan_k_center(
      {n, width, k, metric == "cosine", objective == "max_sum", start == "isolated", candidates_scored});
  constexpr const char* kNames[] = {"exact", "gram", "batches"};
  return {kNames[static_cast<int>(choice.plan)], choice.batch, choice.screened_start};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information and instruction-set control of the fastok CPU library.";
  m.def("available_isas", &available_isas, "Instruction sets this machine has kernels for, slowest first.");
  m.def("active_isa", &active_isa, "The instruction set in use.");
  m.def("set_isa", &set_isa, pybind11::arg("isa"), "Use another instruction set from available_isas().");
  m.def("plan_k_center", &plan_k_center, pybind11::arg("n"), pybind11::arg("width"), pybind11::arg("k"),
        pybind11::arg("metric") = "cosine", pybind11::arg("objective") = "max_min", pybind11::arg("start") = "isolated",
        pybind11::arg("candidates_scored") = 0,
        "How k_center finds picks on the CPU: the plan, candidates scored at once, whether the start is screened.");
  m.def("plan_kept_columns", &fastok::plan_kept_columns, pybind11::arg("rows"), pybind11::arg("n"),
        "How many columns of a pair's similarities max_coverage keeps.");
  m.def("coverage_exponent", &fastok::coverage_exponent, pybind11::arg("rows"), pybind11::arg("peak_exponent"),
        "max_coverage counts similarities in units of 2 to minus this.");
  m.attr("compiler") = std::string(FASTOK_COMPILER);
  m.attr("torch_built_against") = std::string(FASTOK_TORCH_VERSION);
}
