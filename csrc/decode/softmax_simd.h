// What decode attention over dense and packed keys shares: scratch memory, and the softmax relative to the peak so far.
// See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "attention/exp_simd.h"
#include "decode/decode.h"
#include "decode/integer_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
T* take(char*& memory, int64_t count) {
  T* const p = reinterpret_cast<T*>(memory);
  memory += (size_t(count) * sizeof(T) + 63) / 64 * 64;
  return p;
}

// Sizes the members when `memory` is null.
struct Scratch {
  static constexpr int64_t kPitch = kMostPage + kIntegerPitch;  // of arrays by page entry
  static constexpr int64_t kTable = kMostPage * kMostTokenGroups;
  float *logits, *weights;          // [rows][kPitch]
  float *folded, *sums;             // [rows][pitch]: queries times scales, sums before scales
  float *bias, *step, *largest;     // [rows]: what zeros add, what an integer stands for, the largest magnitude
  int16_t* integers;                // [rows][kPitch]: queries or weights
  int8_t* halves;                   // [rows][2][kMostChannels]: the integers' halves
  float *scale, *zero;              // [channels or page entries]
  float *table_scale, *table_zero;  // [group of channels][kMostPage]
  float* table;                     // [page entry][group of channels], on the way to those
  uint8_t* codes;                   // [page][pitch]
  const uint8_t** code_rows;        // [page]
  int32_t *place, *rank;            // [page]
  size_t bytes;

  Scratch(int64_t rows, int64_t width, void* memory) {
    char* at = static_cast<char*>(memory);
    const int64_t pitch = decode_pitch(width);
    logits = take<float>(at, rows * kPitch);
    weights = take<float>(at, rows * kPitch);
    folded = take<float>(at, rows * pitch);
    sums = take<float>(at, rows * pitch);
    bias = take<float>(at, rows);
    step = take<float>(at, rows);
    largest = take<float>(at, rows);
    integers = take<int16_t>(at, rows * kPitch);
    halves = take<int8_t>(at, rows * 2 * kMostChannels);
    scale = take<float>(at, kPitch);
    zero = take<float>(at, kPitch);
    table_scale = take<float>(at, kTable);
    table_zero = take<float>(at, kTable);
    table = take<float>(at, kTable);
    codes = take<uint8_t>(at, kMostPage * pitch + 64);
    code_rows = take<const uint8_t*>(at, kMostPage);
    place = take<int32_t>(at, kMostPage);
    rank = take<int32_t>(at, kMostPage);
    bytes = size_t(at - static_cast<char*>(memory));
  }
};

size_t scratch_bytes(int64_t rows, int64_t width) { return Scratch(rows, width, nullptr).bytes; }

// Logits to probabilities relative to exp(peak), in place, and the state to the new peak. Columns behind n up to a
// whole vector are written too.
void soften(const DecodeRows& rows, int64_t n, const int32_t* place, int64_t newest, int64_t width, float* logits,
            int64_t pitch, const DecodeState& state) {
  const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t r = 0; r < rows.count; ++r) {
    float* const x = logits + r * pitch;
    if (rows.softcap > 0) {
      const vf inverse = splat(1.0f / rows.softcap), cap = splat(rows.softcap);
      for (int64_t i = n; i < whole; ++i) x[i] = 0;
      for (int64_t i = 0; i < whole; i += kLanes) store(x + i, tanh_of(load(x + i) * inverse) * cap);
    }
    if (rows.bias)
      for (int64_t i = 0; i < n; ++i) x[i] += rows.bias[r][place[i]];
    if (newest > rows.last[r])
      for (int64_t i = 0; i < n; ++i)
        if (place[i] > rows.last[r]) x[i] = -kInfinity;
    for (int64_t i = n; i < whole; ++i) x[i] = -kInfinity;
    vf top = load(x);
    for (int64_t i = kLanes; i < whole; i += kLanes) top = maximum(top, load(x + i));
    float peak = horizontal_max(top);
    // A NaN logit must reach the result, however the maximum treats it.
    peak = state.peak[r] > peak ? state.peak[r] : peak;
    if (peak == -kInfinity) {
      for (int64_t i = 0; i < whole; ++i) x[i] = x[i] == -kInfinity ? 0.0f : x[i];
      bool nan = false;
      for (int64_t i = 0; i < n; ++i) nan |= x[i] != x[i];
      if (!nan) continue;
    }
    const float fade = state.peak[r] == peak ? 1.0f : __builtin_expf(state.peak[r] - peak);
    const vf shift = splat(peak * kLog2E), log2e = splat(kLog2E);
    vf total = splat(0.0f);
    for (int64_t i = 0; i < whole; i += kLanes) {
      const vf p = exp2_of(load(x + i) * log2e - shift);
      total = total + p;
      store(x + i, p);
    }
    state.peak[r] = peak;
    state.total[r] = state.total[r] * fade + horizontal_sum(total);
    if (fade == 1.0f) continue;
    float* const sum = state.sum + r * decode_pitch(width);
    for (int64_t d = 0; d < decode_pitch(width); d += kLanes) store(sum + d, load(sum + d) * splat(fade));
  }
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
