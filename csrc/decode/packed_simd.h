// Decode attention over a page of packed keys and values. Scales are folded into queries, probabilities and sums, never
// into a copy of the page. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "decode/expand_simd.h"
#include "decode/packed_dots_simd.h"
#include "decode/softmax_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// The entries of a page that take part, in the order of their rows: segments of them share parameters along channels.
struct Chosen {
  int64_t n, segments;
  bool all;                        // in the order of the page
  int64_t end[kMostTokenGroups];   // of a segment
  int64_t slot[kMostTokenGroups];  // its row in arrays along channels
  bool high[kMostTokenGroups];
};

Chosen choose(const PackedKeys& keys, Scratch& s) {
  const KvPage& page = keys.page;
  Chosen chosen;
  chosen.n = chosen.segments = 0;
  chosen.all = !keys.listed && !page.classes;
  if (chosen.all) {
    for (int64_t entry = 0; entry < page.n; ++entry) {
      s.place[entry] = int32_t(keys.first + entry);
      s.rank[entry] = int32_t(entry);
    }
    for (int64_t slot = 0; slot < page.filled; ++slot) {
      chosen.end[slot] = page.groups_end[slot];
      chosen.slot[slot] = slot;
      chosen.high[slot] = true;
    }
    chosen.n = page.n;
    chosen.segments = page.filled;
    return chosen;
  }
  const auto add = [&](int64_t entry, int64_t rank, int64_t slot, bool high) {
    s.place[chosen.n] = int32_t(keys.first + entry);
    s.rank[chosen.n++] = int32_t(rank);
    if (chosen.segments == 0 || chosen.slot[chosen.segments - 1] != slot || chosen.high[chosen.segments - 1] != high) {
      chosen.slot[chosen.segments] = slot;
      chosen.high[chosen.segments++] = high;
    }
    chosen.end[chosen.segments - 1] = chosen.n;
  };
  int64_t at = 0;
  const auto takes_part = [&](int64_t entry) {
    if (!keys.listed) return true;
    while (at < keys.n_listed && keys.listed[at] < keys.first + entry) ++at;
    return at < keys.n_listed && keys.listed[at] == keys.first + entry;
  };
  if (!page.classes) {
    for (int64_t slot = 0, entry = 0; slot < page.filled; ++slot)
      for (; entry < page.groups_end[slot]; ++entry)
        if (takes_part(entry)) add(entry, entry, slot, true);
    return chosen;
  }
  int64_t rank = 0;
  for (int wanted = 1; wanted >= 0; --wanted) {
    const bool high = wanted == 1;
    at = 0;
    for (int64_t entry = 0; entry < page.n; ++entry) {
      if (page.is_high(entry) != high) continue;
      if (takes_part(entry)) add(entry, rank, 0, high);
      ++rank;
    }
  }
  return chosen;
}

// The chosen rows' codes, a byte each, to s.code_rows.
void expand(const KvSide& side, const KvPage& page, const KvHalf& half, const Chosen& chosen, const uint8_t* data_end,
            Scratch& s) {
  const int64_t pitch = decode_pitch(side.width), high_bytes = side.row_bytes(true);
  const int64_t low_bytes = side.low_bits ? side.row_bytes(false) : 0;
  // While these codes are read, those of the values, or of the next page's keys, are fetched; and now what will be
  // wanted in between.
  const int64_t distance = page.size / 2;
  for (int64_t byte = 0; byte < half.param_rows * side.arrays_width() * side.scale_bytes; byte += 64)
    __builtin_prefetch(half.params + byte);
  const uint8_t* ahead = half.codes + distance;
  // Pages that are read as a whole, not too near the end of the data: several rows at a time, where one part's rows do
  // not write over another's.
  bool apart = side.n_parts == 1;
  for (int i = 0; i < side.n_parts && !apart; ++i) {
    const KvPart& part = side.part[i];
    if (!expands_exactly(part.bits, part.bytes(), part.channels)) break;
    apart = i + 1 == side.n_parts;
  }
  if (apart && chosen.n == page.n && page.n_high == page.n && data_end - half.params >= kSlack) {
    constexpr int64_t kRun = 8;
    for (int64_t i = 0; i < chosen.n; i += kRun) {
      const int64_t n = chosen.n - i < kRun ? chosen.n - i : kRun;
      const uint8_t* row = half.codes + i * high_bytes;
      for (; ahead < row + n * high_bytes + distance; ahead += 64) __builtin_prefetch(ahead);
      for (int64_t j = i; j < i + n; ++j) s.code_rows[j] = s.codes + j * pitch;
      for (int p = 0; p < side.n_parts; ++p) {
        const KvPart& part = side.part[p];
        const CodeRows rows{row, high_bytes, n, s.codes + i * pitch + part.first, pitch};
        if (!expand_at_once(rows, part.bits, part.bytes()))
          rows.each([&](const uint8_t* from, uint8_t* out) { expand_row(from, part.bits, part.channels, out); });
        row += part.bytes();
      }
    }
    return;
  }
  for (int64_t i = 0; i < chosen.n; ++i) {
    const int64_t rank = s.rank[i];
    const bool high = rank < page.n_high;
    const uint8_t* row =
        half.codes + (high ? rank * high_bytes : page.n_high * high_bytes + (rank - page.n_high) * low_bytes);
    const int64_t bytes = high ? high_bytes : low_bytes;
    for (; ahead < row + bytes + distance; ahead += 64) __builtin_prefetch(ahead);
    uint8_t copy[kMostChannels + kSlack];
    if (data_end - row < bytes + kSlack) row = static_cast<const uint8_t*>(std::memcpy(copy, row, size_t(bytes)));
    uint8_t* const out = s.codes + i * pitch;
    for (int part = 0; part < side.n_parts; ++part) {
      expand_codes(row, high ? side.part[part].bits : side.low_bits, side.part[part].channels,
                   out + side.part[part].first);
      row += side.part[part].bytes();
    }
    s.code_rows[i] = out;
  }
}

// x = code * scale + zero along channels: scale[d] times the queries, and what zero[d] adds to a row's every logit.
float fold(const float* q, const float* scale, const float* zero, int64_t width, float* folded) {
  vf bias = splat(0.0f);
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) {
    const vf x = load(q + d);
    store(folded + d, x * load(scale + d));
    bias = fma(x, load(zero + d), bias);
  }
  float sum = horizontal_sum(bias);
  for (; d < width; ++d) {
    folded[d] = q[d] * scale[d];
    sum += q[d] * zero[d];
  }
  return sum;
}

float sum_of(const float* x, int64_t n) {
  vf sum = splat(0.0f);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum = sum + load(x + i);
  return horizontal_sum(i < n ? sum + load_part(x + i, n - i) : sum);
}

// Rows x[row * pitch ..] of n numbers as integers, what they stand for to s.step. False if that would not do.
bool integer_rows(const PackedKeys& keys, const float* x, int64_t pitch, int64_t rows, int64_t n, Scratch& s) {
  if constexpr (kIntegers) {
    for (int64_t r = 0; r < rows && keys.integers; ++r) {
      s.step[r] = to_integers(x + r * pitch, n, s.integers + r * Scratch::kPitch);
      if (s.step[r] != s.step[r]) return false;
    }
    return keys.integers;
  }
  return false;
}

// out[row * kPitch + i] = bias[row] + <q[row], codes of the i-th token from channel `first` on>; no bias: 0.
void code_dots(const PackedKeys& keys, const uint8_t* const* codes, int64_t n, int64_t first, const float* q,
               int64_t rows, int64_t width, const float* bias, float* out, Scratch& s) {
  const int64_t pitch = decode_pitch(keys.fmt->key.width);
  const bool integers = integer_rows(keys, q, pitch, rows, width, s);
  if constexpr (kIntegers) {
    if (integers) integer_dots(codes, n, first, s.integers, Scratch::kPitch, rows, width, out, Scratch::kPitch);
  }
  NothingAhead nothing;
  if (!integers) dots(codes, n, first, q, pitch, rows, width, out, Scratch::kPitch, nothing);
  for (int64_t r = 0; r < rows && (integers || bias); ++r) {
    const vf unit = splat(integers ? s.step[r] : 1.0f), more = splat(bias ? bias[r] : 0.0f);
    float* const x = out + r * Scratch::kPitch;
    for (int64_t i = 0; i < n; i += kLanes) store(x + i, fma(load(x + i), unit, more));
  }
}

// out[row * pitch + d] += the sum over tokens of p[row * kPitch + i] * code of channel first + d.
void code_sums(const PackedKeys& keys, const uint8_t* const* codes, int64_t n, int64_t first, const float* p,
               int64_t rows, int64_t width, float* out, Scratch& s) {
  const int64_t pitch = decode_pitch(keys.fmt->value.width);
  const bool integers = integer_rows(keys, p, Scratch::kPitch, rows, n, s);
  if constexpr (kIntegers) {
    if (integers) integer_sums(codes, n, first, s.integers, Scratch::kPitch, s.step, rows, width, out, pitch);
  }
  NothingAhead nothing;
  if (!integers) weighted_sum(codes, n, first, p, Scratch::kPitch, rows, width, out, pitch, nothing);
}

// Released numerics code real components 0 or s and imaginary ones +-s/2.
bool released_spectrum(const KvSide& side, const KvPart& part) { return side.compat && part.fourier; }

// Of the channels of a group that begins at `first`, the first one that is not code * scale alone.
int64_t shifted_from(const KvSide& side, const KvPart& part, int64_t first) {
  const int64_t imaginary = part.first + part.channels / 2 + 1;
  return released_spectrum(side, part) && first < imaginary ? imaginary : first;
}

// x[row * columns + c] to out[c * kMostPage + row], and zeros behind the rows up to a whole vector.
void columns_of(const float* x, int64_t rows, int64_t columns, float* out) {
  int64_t row = 0;
  if (columns == 2 || columns == 4) {
    for (; row < rows; row += kLanes) {
      const float* const from = x + row * columns;
      vf even[2], odd[2];
      for (int64_t i = 0; i < columns / 2; ++i)
        unzip(load(from + 2 * i * kLanes), load(from + (2 * i + 1) * kLanes), even[i], odd[i]);
      if (columns == 4) {
        const vf first = even[0], second = odd[0];
        unzip(first, even[1], even[0], even[1]);
        unzip(second, odd[1], odd[0], odd[1]);
      }
      for (int64_t i = 0; i < columns / 2; ++i) {
        store(out + 2 * i * kMostPage + row, even[i]);
        store(out + (2 * i + 1) * kMostPage + row, odd[i]);
      }
    }
  }
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t i = row; i < rows; ++i) out[c * kMostPage + i] = x[i * columns + c];
    for (int64_t i = rows; i % kLanes; ++i) out[c * kMostPage + i] = 0;
  }
}

// x = code * scale + zero of every token of the page and every group of channels of one part, to the tables.
void read_table(const KvFormat& fmt, const KvSide& side, const KvHalf& half, int part_index, Scratch& s) {
  const uint8_t* array = half.params;
  for (int i = 0; i < part_index; ++i)
    array += half.param_rows * side.part[i].arrays() * side.groups_of(side.part[i]) * side.scale_bytes;
  const KvPart& part = side.part[part_index];
  const int64_t groups = side.groups_of(part), count = half.param_rows * groups;
  const auto read = [&](const uint8_t* from, float* to) {
    read_scales(from, fmt.scale, 0, count, groups == 1 ? to : s.table);
    columns_of(groups == 1 ? to : s.table, half.param_rows, groups, to);
  };
  read(array, s.table_scale);
  if (part.kind == KvKind::affine) return read(array + count * side.scale_bytes, s.table_zero);
  for (int64_t g = 0; g < groups; ++g) {
    float *const scale = s.table_scale + g * kMostPage, *const zero = s.table_zero + g * kMostPage;
    finish_parameters(side, part, half.param_rows, scale, zero);
    for (int64_t i = half.param_rows; i % kLanes; ++i) zero[i] = 0;
    for (int64_t i = 0; i < half.param_rows && released_spectrum(side, part); ++i) zero[i] = -0.5f * scale[i];
  }
}

// Of the chosen tokens and one group, in whole vectors.
struct Column {
  const float *scale, *zero;
};

Column read_column(const Chosen& chosen, int64_t group, Scratch& s) {
  const float *const scale = s.table_scale + group * kMostPage, *const zero = s.table_zero + group * kMostPage;
  if (chosen.all) return {scale, zero};
  for (int64_t i = 0; i < chosen.n; ++i) {
    s.scale[i] = scale[s.rank[i]];
    s.zero[i] = zero[s.rank[i]];
  }
  for (int64_t i = chosen.n; i % kLanes; ++i) s.scale[i] = s.zero[i] = 0;
  return {s.scale, s.zero};
}

// Whether logits can be had from the codes of the page as they are.
bool suits_packed_dots(const PackedKeys& keys, const Chosen& chosen) {
  const KvSide& side = keys.fmt->key;
  return kPackedDots && keys.integers && chosen.all && !side.per_token && has_whole_words(side);
}

// Of keys with parameters along channels. False, having done nothing, if the queries suit no integers.
bool packed_key_logits(const DecodeRows& rows, const PackedKeys& keys, const Chosen& chosen, Scratch& s) {
  const KvSide& side = keys.fmt->key;
  const int64_t width = side.width, pitch = decode_pitch(width);
  const uint8_t* ahead = keys.page.key.codes + keys.page.size / 2;
  for (int64_t segment = 0, begin = 0; segment < chosen.segments; begin = chosen.end[segment++]) {
    channel_parameters(*keys.fmt, side, keys.page.key, chosen.slot[segment], true, s.scale, s.zero);
    for (int64_t r = 0; r < rows.count; ++r)
      s.bias[r] = fold(rows.q + r * pitch, s.scale, s.zero, width, s.folded + r * pitch);
    if (!integer_rows(keys, s.folded, pitch, rows.count, width, s)) return false;
    split_bytes(s.integers, Scratch::kPitch, rows.count, width, s.halves);
    packed_dots(side, keys.page.key.codes + begin * side.row_bytes(true), chosen.end[segment] - begin, s.halves, s.step,
                s.bias, rows.count, s.logits + begin, Scratch::kPitch, ahead);
  }
  return true;
}

void key_logits(const DecodeRows& rows, const PackedKeys& keys, const Chosen& chosen, Scratch& s) {
  const KvFormat& fmt = *keys.fmt;
  const KvSide& side = fmt.key;
  const int64_t width = side.width, pitch = decode_pitch(width);
  if (!side.per_token) {
    for (int64_t segment = 0, begin = 0; segment < chosen.segments; begin = chosen.end[segment++]) {
      const int64_t n = chosen.end[segment] - begin;
      channel_parameters(fmt, side, keys.page.key, chosen.slot[segment], chosen.high[segment], s.scale, s.zero);
      for (int64_t r = 0; r < rows.count; ++r)
        s.bias[r] = fold(rows.q + r * pitch, s.scale, s.zero, width, s.folded + r * pitch);
      code_dots(keys, s.code_rows + begin, n, 0, s.folded, rows.count, width, s.bias, s.logits + begin, s);
    }
    return;
  }
  for (int64_t r = 0; r < rows.count; ++r)
    for (int64_t i = 0; i < chosen.n; i += kLanes) store(s.logits + r * Scratch::kPitch + i, splat(0.0f));
  for (int part = 0; part < side.n_parts; ++part) {
    const KvPart& of = side.part[part];
    const int64_t groups = side.groups_of(of);
    read_table(fmt, side, keys.page.key, part, s);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = of.first + g * side.group, left = of.first + of.channels - first;
      const int64_t count = left < side.group ? left : side.group;
      const Column column = read_column(chosen, g, s);
      code_dots(keys, s.code_rows, chosen.n, first, rows.q + first, rows.count, count, nullptr, s.weights, s);
      for (int64_t r = 0; r < rows.count; ++r) {
        const int64_t shifted = shifted_from(side, of, first);
        const float whole = sum_of(rows.q + r * pitch + shifted, first + count - shifted);
        float *const x = s.logits + r * Scratch::kPitch, *const dot = s.weights + r * Scratch::kPitch;
        for (int64_t i = 0; i < chosen.n; i += kLanes)
          store(x + i, load(x + i) + fma(load(dot + i), load(column.scale + i), splat(whole) * load(column.zero + i)));
      }
    }
  }
}

void value_sums(const DecodeRows& rows, const PackedKeys& keys, const Chosen& chosen, const DecodeState& state,
                Scratch& s) {
  const KvFormat& fmt = *keys.fmt;
  const KvSide& side = fmt.value;
  const int64_t width = side.width, pitch = decode_pitch(width);
  if (!side.per_token) {
    for (int64_t segment = 0, begin = 0; segment < chosen.segments; begin = chosen.end[segment++]) {
      const int64_t n = chosen.end[segment] - begin;
      channel_parameters(fmt, side, keys.page.value, chosen.slot[segment], chosen.high[segment], s.scale, s.zero);
      for (int64_t d = width; d < pitch; ++d) s.scale[d] = s.zero[d] = 0;
      std::memset(s.sums, 0, size_t(rows.count * pitch) * sizeof(float));
      code_sums(keys, s.code_rows + begin, n, 0, s.logits + begin, rows.count, width, s.sums, s);
      for (int64_t r = 0; r < rows.count; ++r) {
        const vf total = splat(sum_of(s.logits + r * Scratch::kPitch + begin, n));
        float *const sum = state.sum + r * pitch, *const more = s.sums + r * pitch;
        for (int64_t d = 0; d < width; d += kLanes)
          store(sum + d, load(sum + d) + fma(load(more + d), load(s.scale + d), total * load(s.zero + d)));
      }
    }
    return;
  }
  for (int part = 0; part < side.n_parts; ++part) {
    const KvPart& of = side.part[part];
    const int64_t groups = side.groups_of(of);
    read_table(fmt, side, keys.page.value, part, s);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = of.first + g * side.group, left = of.first + of.channels - first;
      const int64_t count = left < side.group ? left : side.group;
      const Column column = read_column(chosen, g, s);
      for (int64_t r = 0; r < rows.count; ++r) {
        const float* const p = s.logits + r * Scratch::kPitch;
        vf whole = splat(0.0f);
        for (int64_t i = 0; i < chosen.n; i += kLanes) {
          store(s.weights + r * Scratch::kPitch + i, load(p + i) * load(column.scale + i));
          whole = fma(load(p + i), load(column.zero + i), whole);
        }
        const float total = horizontal_sum(whole);
        for (int64_t d = shifted_from(side, of, first); d < first + count; ++d) state.sum[r * pitch + d] += total;
      }
      code_sums(keys, s.code_rows, chosen.n, first, s.weights, rows.count, count, state.sum + first, s);
    }
  }
}

void packed(const DecodeRows& rows, const PackedKeys& keys, const DecodeState& state, void* memory) {
  Scratch s(rows.count, keys.fmt->key.width, memory);
  const Chosen chosen = choose(keys, s);
  if (chosen.n == 0) return;
  if (!suits_packed_dots(keys, chosen) || !packed_key_logits(rows, keys, chosen, s)) {
    expand(keys.fmt->key, keys.page, keys.page.key, chosen, keys.data_end, s);
    key_logits(rows, keys, chosen, s);
  }
  soften(rows, chosen.n, s.place, keys.first + keys.page.n - 1, keys.fmt->value.width, s.logits, Scratch::kPitch,
         state);
  expand(keys.fmt->value, keys.page, keys.page.value, chosen, keys.data_end, s);
  value_sums(rows, keys, chosen, state, s);
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
