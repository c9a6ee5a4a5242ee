// Run-time choice of the instruction set. Files named *_simd.cpp are compiled once per entry of `Isa`, each time in
// their own namespace fastok::<isa>, and publish a table of functions; `pick` returns the table to use.
//
// They are built with instructions that other machines lack, so they must not define or instantiate anything with
// linkage outside that namespace (no <algorithm>, no <vector>): the linker could pick that copy for everybody.
#pragma once

#define FASTOK_EXPORT __attribute__((visibility("default")))

namespace fastok {

enum class Isa { baseline, avx2, avx512, avx512_bf16, amx };

// The best instruction set of this machine, unless `set_isa` chose another.
FASTOK_EXPORT Isa active_isa();
// Returns false, changing nothing, where this machine lacks `isa`.
FASTOK_EXPORT bool set_isa(Isa isa);
FASTOK_EXPORT bool has_isa(Isa isa);
// Whether memory is read fastest in one stream that passes by the outer caches, as on AMD's cores; on others in several
// streams far apart.
FASTOK_EXPORT bool reads_one_stream();
FASTOK_EXPORT void set_one_stream(bool one);  // for tests of both, on any machine

#if defined(__x86_64__)
#define FASTOK_DECLARE_KERNELS(Table, name) \
  namespace baseline {                      \
  extern const Table name;                  \
  }                                         \
  namespace avx2 {                          \
  extern const Table name;                  \
  }                                         \
  namespace avx512 {                        \
  extern const Table name;                  \
  }                                         \
  namespace avx512_bf16 {                   \
  extern const Table name;                  \
  }                                         \
  namespace amx {                           \
  extern const Table name;                  \
  }                                         \
  inline const Table& pick_##name() {       \
    switch (active_isa()) {                 \
      case Isa::amx:                        \
        return amx::name;                   \
      case Isa::avx512_bf16:                \
        return avx512_bf16::name;           \
      case Isa::avx512:                     \
        return avx512::name;                \
      case Isa::avx2:                       \
        return avx2::name;                  \
      default:                              \
        return baseline::name;              \
    }                                       \
  }
#else
#define FASTOK_DECLARE_KERNELS(Table, name) \
  namespace baseline {                      \
  extern const Table name;                  \
  }                                         \
  inline const Table& pick_##name() { return baseline::name; }
#endif

}  // namespace fastok
