// CUDA's built-in device functions, as far as fastok uses them, for the machine behind simt.h (which includes this).
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <type_traits>

#include "floats.h"

namespace simt {

int lane();
int synchronise_block(const char* name, bool predicate, Site at);
// PTX's bar.sync and bar.arrive on barriers 1 to 15.
void bar_sync(int id, int count, Site at = Site::here());
void bar_arrive(int id, int count, Site at = Site::here());
// Replaces a value by that of lane `source`.
void shuffle(const char* name, unsigned mask, void* value, size_t bytes, int source, Site at);

enum class Reduction {
  ballot,
  match_any,
  match_all,
  add,
  smallest,
  largest,
  smallest_signed,
  largest_signed,
  all,
  any,
  odd
};
uint64_t reduce(const char* name, unsigned mask, uint64_t value, Reduction reduction, Site at);

// An atomic update of up to 8 bytes is what happens between these two.
uint64_t begin_atomic(const void* address, size_t bytes);
void end_atomic(void* address, size_t bytes, uint64_t value);

template <class V>
uint64_t bits_of(V value) {
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(V));
  return bits;
}
template <class V>
V of_bits(uint64_t bits) {
  V value;
  __builtin_memcpy(&value, &bits, sizeof(V));
  return value;
}

template <class V, class... Types>
concept OneOf = (std::same_as<V, Types> || ...);

template <class V, class Update>
V update_atomically(V* address, Update update) {
  const V old = of_bits<V>(begin_atomic(address, sizeof(V)));
  end_atomic(address, sizeof(V), bits_of(V(update(old))));
  return old;
}

}  // namespace simt

// ---- barriers -------------------------------------------------------------------------------------------------------

inline void __syncthreads(simt::Site at = simt::Site::here()) { simt::synchronise_block("__syncthreads", false, at); }
inline int __syncthreads_count(int predicate, simt::Site at = simt::Site::here()) {
  return simt::synchronise_block("__syncthreads_count", predicate != 0, at);
}
inline int __syncthreads_or(int predicate, simt::Site at = simt::Site::here()) {
  return simt::synchronise_block("__syncthreads_or", predicate != 0, at) > 0;
}
inline int __syncthreads_and(int predicate, simt::Site at = simt::Site::here()) {
  return simt::synchronise_block("__syncthreads_and", predicate == 0, at) == 0;
}
void __syncwarp(unsigned mask = 0xffffffffu, simt::Site at = simt::Site::here());
void __threadfence();

// ---- warp collectives: they let lanes meet, but order no memory (that is what __syncwarp is for)
// ----------------------

template <class V>
V __shfl_sync(unsigned mask, V value, int source, int width = 32, simt::Site at = simt::Site::here()) {
  const int segment = simt::lane() & ~(width - 1);
  simt::shuffle("__shfl_sync", mask, &value, sizeof(V), segment | (source & (width - 1)), at);
  return value;
}
template <class V>
V __shfl_up_sync(unsigned mask, V value, unsigned steps, int width = 32, simt::Site at = simt::Site::here()) {
  const int lane = simt::lane(), source = lane - int(steps);
  simt::shuffle("__shfl_up_sync", mask, &value, sizeof(V), source < (lane & ~(width - 1)) ? lane : source, at);
  return value;
}
template <class V>
V __shfl_down_sync(unsigned mask, V value, unsigned steps, int width = 32, simt::Site at = simt::Site::here()) {
  const int lane = simt::lane(), source = lane + int(steps);
  simt::shuffle("__shfl_down_sync", mask, &value, sizeof(V), source > (lane | (width - 1)) ? lane : source, at);
  return value;
}
template <class V>
V __shfl_xor_sync(unsigned mask, V value, int bits, int width = 32, simt::Site at = simt::Site::here()) {
  const int lane = simt::lane(), source = lane ^ bits;
  simt::shuffle("__shfl_xor_sync", mask, &value, sizeof(V), source > (lane | (width - 1)) ? lane : source, at);
  return value;
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site at = simt::Site::here()) {
  return unsigned(simt::reduce("__ballot_sync", mask, predicate != 0, simt::Reduction::ballot, at));
}
inline int __any_sync(unsigned mask, int predicate, simt::Site at = simt::Site::here()) {
  return simt::reduce("__any_sync", mask, predicate != 0, simt::Reduction::any, at) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site at = simt::Site::here()) {
  return simt::reduce("__all_sync", mask, predicate != 0, simt::Reduction::all, at) != 0;
}
template <class V>
unsigned __match_any_sync(unsigned mask, V value, simt::Site at = simt::Site::here()) {
  return unsigned(simt::reduce("__match_any_sync", mask, simt::bits_of(value), simt::Reduction::match_any, at));
}
template <class V>
unsigned __match_all_sync(unsigned mask, V value, int* all, simt::Site at = simt::Site::here()) {
  const auto peers = simt::reduce("__match_all_sync", mask, simt::bits_of(value), simt::Reduction::match_all, at);
  *all = peers != 0;
  return unsigned(peers);
}

template <simt::OneOf<int, unsigned> V>
V __reduce_add_sync(unsigned mask, V value, simt::Site at = simt::Site::here()) {
  return V(simt::reduce("__reduce_add_sync", mask, uint64_t(value), simt::Reduction::add, at));
}
template <simt::OneOf<int, unsigned> V>
V __reduce_min_sync(unsigned mask, V value, simt::Site at = simt::Site::here()) {
  const auto which = std::is_signed_v<V> ? simt::Reduction::smallest_signed : simt::Reduction::smallest;
  return V(simt::reduce("__reduce_min_sync", mask, uint64_t(value), which, at));
}
template <simt::OneOf<int, unsigned> V>
V __reduce_max_sync(unsigned mask, V value, simt::Site at = simt::Site::here()) {
  const auto which = std::is_signed_v<V> ? simt::Reduction::largest_signed : simt::Reduction::largest;
  return V(simt::reduce("__reduce_max_sync", mask, uint64_t(value), which, at));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value, simt::Site at = simt::Site::here()) {
  return unsigned(simt::reduce("__reduce_and_sync", mask, value, simt::Reduction::all, at));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, simt::Site at = simt::Site::here()) {
  return unsigned(simt::reduce("__reduce_or_sync", mask, value, simt::Reduction::any, at));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value, simt::Site at = simt::Site::here()) {
  return unsigned(simt::reduce("__reduce_xor_sync", mask, value, simt::Reduction::odd, at));
}

// ---- atomics: one fiber runs at a time, so only the order is left to chance
// -------------------------------------------

template <simt::OneOf<int, unsigned, unsigned long long, float, double> V>
V atomicAdd(V* address, std::type_identity_t<V> value) {
  if constexpr (std::is_same_v<V, int>) {  // wraps around
    return simt::update_atomically(address, [=](int old) { return int(unsigned(old) + unsigned(value)); });
  } else {
    return simt::update_atomically(address, [=](V old) { return old + value; });
  }
}
template <simt::OneOf<int, unsigned, long long, unsigned long long> V>
V atomicMin(V* address, std::type_identity_t<V> value) {
  return simt::update_atomically(address, [=](V old) { return old < value ? old : value; });
}
template <simt::OneOf<int, unsigned, long long, unsigned long long> V>
V atomicMax(V* address, std::type_identity_t<V> value) {
  return simt::update_atomically(address, [=](V old) { return old > value ? old : value; });
}
template <simt::OneOf<int, unsigned, unsigned long long> V>
V atomicAnd(V* address, std::type_identity_t<V> value) {
  return simt::update_atomically(address, [=](V old) { return old & value; });
}
template <simt::OneOf<int, unsigned, unsigned long long> V>
V atomicOr(V* address, std::type_identity_t<V> value) {
  return simt::update_atomically(address, [=](V old) { return old | value; });
}
template <simt::OneOf<int, unsigned, unsigned long long> V>
V atomicXor(V* address, std::type_identity_t<V> value) {
  return simt::update_atomically(address, [=](V old) { return old ^ value; });
}
template <simt::OneOf<int, unsigned, unsigned long long, float> V>
V atomicExch(V* address, std::type_identity_t<V> value) {
  return simt::update_atomically(address, [=](V) { return value; });
}
template <simt::OneOf<int, unsigned, unsigned long long> V>
V atomicCAS(V* address, std::type_identity_t<V> expected, std::type_identity_t<V> value) {
  return simt::update_atomically(address, [=](V old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return simt::update_atomically(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}

// ---- loads and bits -------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
// Sums and products that are never fused (-ffp-contract=off).
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
// To the nearest integer, even ones of two; NaN to 0, what is too large to the largest.
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  return x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : int(std::nearbyintf(x));
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(unsigned(x)) + 1; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
using std::isfinite;
using std::isnan;
using std::max;
using std::min;
