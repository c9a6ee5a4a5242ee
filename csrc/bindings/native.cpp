// fastok._native: build information and control of the instruction set, for `fastok info` and for tests.
// Nothing needs it at run time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"

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

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build information and instruction-set control of the fastok CPU library.";
  m.def("available_isas", &available_isas, "Instruction sets this machine has kernels for, slowest first.");
  m.def("active_isa", &active_isa, "The instruction set in use.");
  m.def("set_isa", &set_isa, pybind11::arg("isa"), "Use another instruction set from available_isas().");
  m.attr("compiler") = std::string(FASTOK_COMPILER);
  m.attr("torch_built_against") = std::string(FASTOK_TORCH_VERSION);
}
