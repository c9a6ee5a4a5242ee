#include "cpu/dispatch.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastok {
namespace {

#if defined(__x86_64__)
struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf leaf7(unsigned part) {
  Leaf leaf;
  if (!__get_cpuid_count(7, part, &leaf.eax, &leaf.ebx, &leaf.ecx, &leaf.edx)) return {};
  return leaf;
}

// With VNNI's integer products and VBMI's permutations of bytes, which every core has but Intel's Cooper Lake.
bool has_bf16_products() {
  return (leaf7(1).eax & (1u << 5)) && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

// Intel's cores since Golden Cove, which are those with AVX512-FP16, take two cycles for a vector of bf16 products but
// half a cycle for one of fp32 products: converting is faster where they have no AMX.
bool fast_bf16_products() {
  const bool avx512_fp16 = leaf7(0).edx & (1u << 23), intel = __builtin_cpu_is("intel");
  return has_bf16_products() && !(intel && avx512_fp16);
}

// AMX registers need the kernel's permission (Linux 5.16), asked for once per process.
bool amx_usable() {
  constexpr unsigned amx = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8: no core has only some of them
  if ((leaf7(0).edx & amx) != amx || !has_bf16_products()) return false;
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
}

Isa detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c"))
    return Isa::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return Isa::avx2;
  if (amx_usable()) return Isa::amx;
  return fast_bf16_products() ? Isa::avx512_bf16 : Isa::avx512;
}
#else
Isa detect() { return Isa::baseline; }
#endif

Isa best_isa() {
  static const Isa isa = detect();
  return isa;
}

std::atomic<int> chosen{-1};

bool is_amd() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

std::atomic<bool>& one_stream() {
  static std::atomic<bool> one{is_amd()};
  return one;
}

}  // namespace

bool reads_one_stream() { return one_stream().load(std::memory_order_relaxed); }
void set_one_stream(bool one) { one_stream().store(one, std::memory_order_relaxed); }

bool has_isa(Isa isa) { return isa <= best_isa(); }

Isa active_isa() {
  const int isa = chosen.load(std::memory_order_relaxed);
  return isa < 0 ? best_isa() : static_cast<Isa>(isa);
}

bool set_isa(Isa isa) {
  if (!has_isa(isa)) return false;
  chosen.store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

}  // namespace fastok
