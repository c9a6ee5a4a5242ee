// What the compiler calls in instrumented code: for every load and store (-fsanitize=thread), for every undefined
// operation (-fsanitize=undefined), and for the memory functions of C. No sanitizer's runtime is linked; these are all
// there is. Outside of kernels they do nothing.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "machine.h"

using simt::Access;
using simt::current;

namespace {

inline void touch(const void* p, size_t size, Access access, const void* caller) {
  if (current && size > 0) simt::Machine::get().memory().touch(p, size, access, simt::pc_of(caller));
}

inline void touch_aligned(const void* p, size_t size, Access access, const void* caller) {
  if (!current) return;
  if (reinterpret_cast<uintptr_t>(p) % size != 0)
    simt::Machine::get().memory().require_aligned(p, size, "access", simt::pc_of(caller));
  touch(p, size, access, caller);
}

// What every record of UBSan begins with.
struct UndefinedPlace {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void undefined(const char* what, const void* record) {
  const auto& place = *static_cast<const UndefinedPlace*>(record);
  const std::string at = std::string(place.file) + ":" + std::to_string(place.line);
  if (current) {
    simt::Machine& machine = simt::Machine::get();
    machine.fail("undefined behaviour: " + std::string(what) + "\n  thread    " + machine.describe(*current) +
                 "\n            at " + at);
  }
  std::fprintf(stderr, "%s: undefined behaviour: %s\n", at.c_str(), what);
  std::abort();
}

}  // namespace

#define CALLER __builtin_return_address(0)

extern "C" {

void __tsan_init() {}

// ---- loads and stores -----------------------------------------------------------------------------------------------

// "Unaligned" are accesses whose type asks for less than their size, such as copies of small structs.
#define ACCESSES(size)                                                                         \
  void __tsan_read##size(void* p) { touch_aligned(p, size, Access::read, CALLER); }            \
  void __tsan_write##size(void* p) { touch_aligned(p, size, Access::write, CALLER); }          \
  void __tsan_volatile_read##size(void* p) { touch_aligned(p, size, Access::read, CALLER); }   \
  void __tsan_volatile_write##size(void* p) { touch_aligned(p, size, Access::write, CALLER); } \
  void __tsan_unaligned_read##size(void* p) { touch(p, size, Access::read, CALLER); }          \
  void __tsan_unaligned_write##size(void* p) { touch(p, size, Access::write, CALLER); }        \
  void __tsan_unaligned_volatile_read##size(void* p) { touch(p, size, Access::read, CALLER); } \
  void __tsan_unaligned_volatile_write##size(void* p) { touch(p, size, Access::write, CALLER); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

void __tsan_read_range(void* p, size_t size) { touch(p, size, Access::read, CALLER); }
void __tsan_write_range(void* p, size_t size) { touch(p, size, Access::write, CALLER); }

// ---- memory functions: instrumented code calls them by these names (simt.h)
// -------------------------------------------

void* simt_memcpy(void* to, const void* from, size_t size) {
  touch(from, size, Access::read, CALLER), touch(to, size, Access::write, CALLER);
  return std::memcpy(to, from, size);
}
void* simt_memmove(void* to, const void* from, size_t size) {
  touch(from, size, Access::read, CALLER), touch(to, size, Access::write, CALLER);
  return std::memmove(to, from, size);
}
void* simt_memset(void* to, int value, size_t size) {
  touch(to, size, Access::write, CALLER);
  return std::memset(to, value, size);
}

// ---- undefined behaviour --------------------------------------------------------------------------------------------

#define UNDEFINED(name, what) \
  void __ubsan_handle_##name(void* record) { undefined(what, record); }
UNDEFINED(add_overflow, "signed addition overflows")
UNDEFINED(sub_overflow, "signed subtraction overflows")
UNDEFINED(mul_overflow, "signed multiplication overflows")
UNDEFINED(negate_overflow, "negation overflows")
UNDEFINED(divrem_overflow, "division by zero, or its result overflows")
UNDEFINED(shift_out_of_bounds, "shift by a negative number or by too much")
UNDEFINED(out_of_bounds, "index outside of the array")
UNDEFINED(builtin_unreachable, "unreachable code")
UNDEFINED(missing_return, "function without a result")
UNDEFINED(vla_bound_not_positive, "array of negative length")
UNDEFINED(load_invalid_value, "load of a bool or enum that has no such value")
UNDEFINED(nonnull_arg, "null for a parameter that may not be")
UNDEFINED(nonnull_return_v1, "null from a function that may not return it")
UNDEFINED(invalid_builtin, "zero for a builtin that does not take it")
UNDEFINED(pointer_overflow, "pointer arithmetic leaves the address space, or starts from null")
#undef UNDEFINED

void __ubsan_handle_type_mismatch_v1(void* record, const void* p) {
  struct TypeMismatch {
    UndefinedPlace place;
    const void* type;
    unsigned char log_alignment, kind;
  };
  if (p && current)
    simt::Machine::get().memory().require_aligned(p, size_t(1) << static_cast<TypeMismatch*>(record)->log_alignment,
                                                  "access", simt::pc_of(CALLER));
  undefined(p ? "misaligned pointer for its type" : "null pointer", record);
}

}  // extern "C"
