// fastok's CUDA kernels on the host SIMT machine, for Python. Shapes and dtypes are checked by the wrapper
// (__init__.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call.h"
#include "floats.h"
#include "k_center/k_center_plan.h"
#include "machine.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Op = void (*)(const simt::Call&);
const std::map<std::string, Op> kOps{{"bipartite_match", simt::bipartite_match},
                                     {"nearest", simt::nearest},
                                     {"k_center", simt::k_center},
                                     {"max_coverage", simt::max_coverage},
                                     {"top_tokens", simt::top_tokens},
                                     {"sample_cdf", simt::sample_cdf},
                                     {"density_peaks", simt::density_peaks},
                                     {"build_map", simt::build_map},
                                     {"rows", simt::rows},
                                     {"attention", simt::attention},
                                     {"attention_backward", simt::attention_backward},
                                     {"attention_scores", simt::attention_scores},
                                     {"label_scores", simt::label_scores},
                                     {"select_tokens", simt::select_tokens},
                                     {"decode", simt::decode},
                                     {"decode_packed", simt::decode_packed},
                                     {"kv_seal", simt::kv_seal},
                                     {"kv_unseal", simt::kv_unseal},
                                     {"sample", simt::sample}};

// Address, shape, strides, bytes of an element.
using Described = std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, size_t>;
using Arrays = std::map<std::string, Described>;

void call(const std::string& op, uint64_t seed, const Arrays& inputs, const Arrays& outputs,
          const std::map<std::string, double>& numbers, const std::map<std::string, std::string>& words) {
  simt::Call call{seed, {}, numbers, words};
  simt::Machine& machine = simt::Machine::get();
  machine.begin_call(seed);
  const auto add = [&](const Arrays& arrays, simt::Role role) {
    for (const auto& [name, described] : arrays) {
      const auto& [address, shape, strides, element] = described;
      auto* const data = reinterpret_cast<unsigned char*>(address);
      machine.memory().add({name, data, shape, strides, element, role});
      call.arrays[name] = {data, shape, strides};
    }
  };
  add(inputs, simt::Role::input);
  add(outputs, simt::Role::output);
  kOps.at(op)(call);
  machine.memory().end_call();
}

}  // namespace

void simt::add_output(const char* name, void* data, int64_t count, size_t element) {
  Machine::get().memory().add({name, static_cast<unsigned char*>(data), {count}, {1}, element, Role::output});
}

void simt::add_working(const char* name, void* data, int64_t count, size_t element) {
  Machine::get().memory().add({name, static_cast<unsigned char*>(data), {count}, {1}, element, Role::working});
}

PYBIND11_MODULE(_host_cuda, m) {
  py::register_exception<simt::Failure>(m, "Failure");
  m.def("call", &call);
  m.def("launches", [] { return simt::Machine::get().launches(); });
  m.def("report_races", [](bool report) { simt::Machine::get().memory().report_races = report; });

  m.def(
      "plan_k_center",
      [](int64_t batch, int64_t n, int64_t width, int64_t k, bool cosine, bool max_sum, bool isolated, int arch,
         size_t most_bytes) {
        const auto plan =
            fastok::cuda::plan_k_center({batch, n, width, k, cosine, max_sum, isolated}, {arch, most_bytes});
        const auto& cluster = plan.cluster;
        return py::dict("gram"_a = plan.gram, "blocks"_a = cluster.blocks, "warps"_a = cluster.warps,
                        "share"_a = cluster.share, "resident"_a = cluster.resident,
                        "shared_state"_a = cluster.shared_state, "bytes"_a = cluster.bytes);
      },
      "batch"_a, "n"_a, "width"_a, "k"_a, "cosine"_a, "max_sum"_a, "isolated"_a, "arch"_a, "most_bytes"_a);
  m.def("half_to_float", [](uint16_t x) { return __half2float({x}); });
  m.def("float_to_half", [](float x) { return __float2half_rn(x).bits; });
  m.def("float_to_bfloat16", [](float x) { return __float2bfloat16_rn(x).bits; });
  m.def("fp8_to_half",
        [](uint8_t x, bool e5m2) { return __nv_cvt_fp8_to_halfraw(x, e5m2 ? __NV_E5M2 : __NV_E4M3).bits; });
  m.def("float_to_fp8", [](float x, bool e5m2, bool saturate) {
    return __nv_cvt_float_to_fp8(x, saturate ? __NV_SATFINITE : __NV_NOSAT, e5m2 ? __NV_E5M2 : __NV_E4M3);
  });
}
