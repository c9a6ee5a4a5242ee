// CUDA's built-in device functions, as far as fastok uses them, for the machine in simt.h (which includes this).
#pragma once

// ---- barriers -------------------------------------------------------------------------------------------------------

inline void __syncthreads() { simt::Machine::get().wait(simt::Machine::get().block(), "__syncthreads"); }
inline void __syncwarp() { simt::Machine::get().wait(simt::Machine::get().warp(), "__syncwarp"); }
inline void __threadfence() {}

inline int __syncthreads_or(int predicate) {
  // Three words used in turn: each is cleared two barriers before it is written again.
  static int words[3];
  const int turn = simt::Machine::get().self().syncs++;
  if (turn == 0) words[0] = words[1] = 0;
  __syncthreads();
  if (predicate) words[turn % 3] = 1;
  __syncthreads();
  const int result = words[turn % 3];
  words[(turn + 1) % 3] = 0;
  return result;
}

// ---- warp collectives -----------------------------------------------------------------------------------------------

template <class V>
V __shfl_sync(unsigned mask, V value, int source) {
  simt::require_full(mask);
  return simt::gather("__shfl_sync", value)[size_t(source) % simt::kWarpSize];
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits) {
  simt::require_full(mask);
  return simt::gather("__shfl_xor_sync", value)[size_t(simt::lane() ^ bits)];
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned steps) {
  simt::require_full(mask);
  const auto all = simt::gather("__shfl_up_sync", value);
  return simt::lane() < int(steps) ? value : all[size_t(simt::lane()) - steps];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  simt::require_full(mask);
  const auto all = simt::gather("__ballot_sync", predicate);
  unsigned result = 0;
  for (size_t i = 0; i < all.size(); ++i) result |= unsigned(all[i] != 0) << i;
  return result;
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  simt::require_full(mask);
  const auto all = simt::gather("__match_any_sync", value);
  unsigned result = 0;
  for (size_t i = 0; i < all.size(); ++i) result |= unsigned(all[i] == value) << i;
  return result;
}

// ---- atomics: one fiber runs at a time, so only the order is left to chance -----------------------------------------

template <class V, class Update>
V update_atomically(V* address, Update update) {
  simt::Machine::get().yield();
  const V old = *address;
  *address = update(old);
  return old;
}
inline int atomicAdd(int* address, int value) {
  return update_atomically(address, [=](int old) { return old + value; });
}
inline int atomicMin(int* address, int value) {
  return update_atomically(address, [=](int old) { return std::min(old, value); });
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  return update_atomically(address, [=](unsigned old) { return old | value; });
}

// ---- loads, bits, conversions ---------------------------------------------------------------------------------------

template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }

inline float __half2float(__half x) {
  const unsigned sign = unsigned(x.bits & 0x8000) << 16, exponent = (x.bits >> 10) & 31, mantissa = x.bits & 1023;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  if (exponent == 0) return std::copysign(std::ldexp(float(mantissa), -24), __uint_as_float(sign | 0x3f800000u));
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = uint16_t((__float_as_uint(x) >> 16) & 0x8000);
  if (std::isnan(x)) return {uint16_t(sign | 0x7fff)};
  const float size = std::fabs(x);
  if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  // The unit in the last place of a half near x; nearbyint rounds halves to even.
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
  const int units = int(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {uint16_t(sign | (units + ((exponent + 14) << 10)))};
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
