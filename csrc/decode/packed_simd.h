// Decode attention over a page of packed keys and values. Scales are folded into queries, probabilities and sums, never
// into a copy of the page. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include <initializer_list>

#include "decode/expand_simd.h"
#include "decode/packed_dots_simd.h"
#include "decode/packed_sums_simd.h"
#include "decode/softmax_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

// Neighbouring rows with the same parameters along channels.
struct Segment {
  int64_t begin, end;
  int64_t slot;  // their row in arrays along channels
  bool high;
};

// The entries of a page that take part, in the order of their rows.
struct Chosen {
  int64_t n, segments;
  bool whole;  // all of the page, in the order of its rows
  Segment segment[kMostTokenGroups];

  // Rows up to `end` belong to the segment that was last, or to the next.
  void extend(int64_t end, int64_t slot, bool high) {
    if (segments == 0 || segment[segments - 1].slot != slot || segment[segments - 1].high != high)
      segment[segments++] = {n, end, slot, high};
    n = segment[segments - 1].end = end;
  }
  // Calls back with each segment; of a side whose classes have the same parameters, with all rows of a token group.
  template <class Each>
  void each_segment(const KvSide& side, const Each& each) const {
    for (int64_t i = 0; i < segments; ++i) {
      Segment of = segment[i];
      while (!side.two_classes && i + 1 < segments && segment[i + 1].slot == of.slot) of.end = segment[++i].end;
      each(of);
    }
  }
};

// Calls back with each entry of a class, in order.
template <class Each>
void each_of_class(const KvPage& page, bool high, const Each& each) {
  for (int64_t first = 0; first < page.n; first += 8) {
    const unsigned there = page.n - first < 8 ? (1u << (page.n - first)) - 1 : 0xffu;
    const unsigned bits = page.high_bits(first);
    for (unsigned left = high ? bits : there & ~bits; left; left &= left - 1) each(first + __builtin_ctz(left));
  }
}

Chosen choose(const PackedKeys& keys, Scratch& s) {
  const KvPage& page = keys.page;
  Chosen chosen;
  chosen.n = chosen.segments = 0;
  chosen.whole = !keys.listed;
  if (chosen.whole) {
    for (int64_t i = 0; i < page.n; ++i) s.rank[i] = int32_t(i);
    if (page.classes) {
      int64_t rank = 0;
      for (const bool high : {true, false})
        each_of_class(page, high, [&](int64_t entry) { s.place[rank++] = int32_t(keys.first + entry); });
      if (page.n_high > 0) chosen.extend(page.n_high, 0, true);
      if (page.n_high < page.n) chosen.extend(page.n, 0, false);
      return chosen;
    }
    for (int64_t entry = 0; entry < page.n; ++entry) s.place[entry] = int32_t(keys.first + entry);
    for (int64_t slot = 0; slot < page.filled; ++slot) chosen.extend(page.groups_end[slot], slot, true);
    return chosen;
  }
  int64_t at = 0;
  const auto add_if_listed = [&](int64_t entry, int64_t rank, int64_t slot, bool high) {
    while (at < keys.n_listed && keys.listed[at] < keys.first + entry) ++at;
    if (at == keys.n_listed || keys.listed[at] != keys.first + entry) return;
    s.place[chosen.n] = int32_t(keys.first + entry);
    s.rank[chosen.n] = int32_t(rank);
    chosen.extend(chosen.n + 1, slot, high);
  };
  if (!page.classes) {
    for (int64_t slot = 0, entry = 0; slot < page.filled; ++slot)
      for (; entry < page.groups_end[slot]; ++entry) add_if_listed(entry, entry, slot, true);
    return chosen;
  }
  int64_t rank = 0;
  for (const bool high : {true, false}) {
    at = 0;
    each_of_class(page, high, [&](int64_t entry) { add_if_listed(entry, rank++, 0, high); });
  }
  return chosen;
}

// While codes are read, those of the values, or of the next page's keys, are fetched, from what this returns on; and
// now what will be wanted in between.
const uint8_t* fetch_ahead(const KvSide& side, const KvPage& page, const KvHalf& half) {
  const int64_t param_bytes = side.params_size(page.n_high, page.n - page.n_high, page.filled);
  for (int64_t byte = 0; byte < param_bytes; byte += 64) __builtin_prefetch(half.params + byte);
  return half.codes + page.size / 2;
}

// The chosen rows' codes, a byte each, to s.code_rows.
void expand(const KvSide& side, const KvPage& page, const KvHalf& half, const Chosen& chosen, const uint8_t* data_end,
            Scratch& s) {
  const int64_t pitch = decode_pitch(side.width);
  const int64_t distance = page.size / 2;
  const uint8_t* ahead = fetch_ahead(side, page, half);
  // Pages that are read as a whole, not too near the end of the data: several rows of a class at a time, where one
  // part's rows do not write over another's.
  const auto apart = [&](bool high) {
    for (int i = 0; i < side.n_parts && side.n_parts > 1; ++i) {
      const KvPart& part = side.part_of(i, high);
      if (!expands_exactly(part.bits, part.bytes(), part.channels)) return false;
    }
    return true;
  };
  const bool all_at_once = chosen.whole && data_end - half.params >= kSlack;
  const uint8_t* first_row = half.codes;
  int64_t i = 0;
  for (const bool high : {true, false}) {
    const int64_t bytes = side.row_bytes(high), first_rank = high ? 0 : page.n_high;
    const int64_t end_rank = high ? page.n_high : page.n;
    if (all_at_once && apart(high)) {
      constexpr int64_t kRun = 8;
      for (; i < end_rank; i += kRun) {
        const int64_t n = end_rank - i < kRun ? end_rank - i : kRun;
        const uint8_t* row = first_row + (i - first_rank) * bytes;
        for (; ahead < row + n * bytes + distance; ahead += 64) __builtin_prefetch(ahead);
        for (int64_t j = i; j < i + n; ++j) s.code_rows[j] = s.codes + j * pitch;
        for (int p = 0; p < side.n_parts; ++p) {
          const KvPart& part = side.part_of(p, high);
          const CodeRows rows{row, bytes, n, s.codes + i * pitch + part.first, pitch};
          if (!expand_at_once(rows, part.bits, part.bytes()))
            rows.each([&](const uint8_t* from, uint8_t* out) { expand_row(from, part.bits, part.channels, out); });
          row += part.bytes();
        }
      }
      i = end_rank;
    }
    for (; i < chosen.n && s.rank[i] < end_rank; ++i) {
      const uint8_t* row = first_row + (s.rank[i] - first_rank) * bytes;
      for (; ahead < row + bytes + distance; ahead += 64) __builtin_prefetch(ahead);
      uint8_t copy[kMostChannels + kSlack];
      if (data_end - row < bytes + kSlack) row = static_cast<const uint8_t*>(std::memcpy(copy, row, size_t(bytes)));
      uint8_t* const out = s.codes + i * pitch;
      for (int p = 0; p < side.n_parts; ++p) {
        const KvPart& part = side.part_of(p, high);
        expand_codes(row, part.bits, part.channels, out + part.first);
        row += part.bytes();
      }
      s.code_rows[i] = out;
    }
    first_row += page.n_high * bytes;
  }
}

// x = code * scale + zero along what rows of q run along, in whole vectors: scale[d] times q, its largest magnitude or
// something not finite if there is any, and what zero[d] adds to every product.
void fold(const float* q, int64_t q_pitch, int64_t rows, const float* scale, const float* zero, int64_t n,
          float* folded, int64_t pitch, float* added, float* largest) {
  by_rows(rows, [&](auto some, int64_t first) {
    vf sum[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};
    vi most[4] = {splat(0), splat(0), splat(0), splat(0)};
    for (int64_t d = 0; d < n; d += kLanes) {
      const vf of_scale = load(scale + d), of_zero = load(zero + d);
#pragma GCC unroll 4
      for (int r = 0; r < some.count; ++r) {
        const vf x = load(q + (first + r) * q_pitch + d), y = x * of_scale;
        store(folded + (first + r) * pitch + d, y);
        sum[r] = fma(x, of_zero, sum[r]);
        most[r] = maximum(most[r], magnitude_bits(y));
      }
    }
    float sums[4];
    int32_t maxima[4];
    horizontal_sums(sum, sums);
    horizontal_maxima(most, maxima);
    std::memcpy(added + first, sums, some.count * sizeof(float));
    std::memcpy(largest + first, maxima, some.count * sizeof(float));
  });
}

// The sum, and the largest magnitude likewise.
float sum_of(const float* x, int64_t n, float& largest) {
  vf sum = splat(0.0f);
  vi most = splat(0);
  const auto add = [&](vf y) {
    sum = sum + y;
    most = maximum(most, magnitude_bits(y));
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(load(x + i));
  if (i < n) add(load_part(x + i, n - i));
  largest = float_of(uint32_t(horizontal_max(most)));
  return horizontal_sum(sum);
}

// Rows x[row * pitch ..] of n numbers up to s.largest as integers, or as halves of them for codes as they lie in a
// page; what they stand for to s.step. False if that would not do.
template <bool kHalf>
bool integer_rows(const PackedKeys& keys, const float* x, int64_t pitch, int64_t rows, int64_t n, Scratch& s) {
  for (int64_t r = 0; r < rows && kIntegers && keys.integers; ++r) {
    const IntegerScale scale(s.largest[r]);
    if (!scale) return false;
    s.step[r] = scale.step;
    if constexpr (kHalf)
      to_halves(x + r * pitch, n, scale, s.halves + 2 * r * kMostChannels);
    else
      to_integers(x + r * pitch, n, scale, s.integers + r * Scratch::kPitch);
  }
  return kIntegers && keys.integers;
}

// out[row * kPitch + i] = bias[row] + <q[row], codes of the i-th token from channel `first` on>; no bias: 0. Numbers of
// q are up to s.largest.
void code_dots(const PackedKeys& keys, const uint8_t* const* codes, int64_t n, int64_t first, const float* q,
               int64_t rows, int64_t width, const float* bias, float* out, Scratch& s) {
  const int64_t pitch = decode_pitch(keys.fmt->key.width);
  const bool integers = integer_rows<false>(keys, q, pitch, rows, width, s);
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

// Sums of the codes of a page's values: of codes as they lie in the page where that can be, else of expanded ones.
class CodeSums {
 public:
  CodeSums(const PackedKeys& keys, const Chosen& chosen, Scratch& s)
      : keys_(keys), side_(keys.fmt->value), chosen_(chosen), s_(s), quads_(side_.part[0]) {
    const KvHalf& half = keys.page.value;
    const bool whole = chosen.whole && keys.page.n == keys.fmt->page && keys.data_end - half.params >= kSlack;
    in_place_ = keys.integers && whole && suits_packed_sums(side_, chosen.n, kMostPage * decode_pitch(side_.width));
    if (in_place_) {
      ahead_.line = fetch_ahead(side_, keys.page, half);
      ahead_.end = ahead_.line + keys.page.size / 2;
      quads_of(quads_, half.codes, chosen.n, ahead_, s.codes);
    } else {
      expand(side_, keys.page, half, chosen, keys.data_end, s);
    }
  }

  // out[row * pitch + d] += the sum over tokens [begin, end) of p[row * kPitch + i] * code of channel first + d; p up
  // to s.largest.
  void add(int64_t begin, int64_t end, int64_t first, const float* p, int64_t rows, int64_t width, float* out) {
    const int64_t n = end - begin, pitch = decode_pitch(side_.width);
    if (in_place_) {
      if (integer_rows<true>(keys_, p, Scratch::kPitch, rows, n, s_)) {
        const uint8_t* const words = s_.codes + begin / 4 * quads_.bytes();
        const bool all = width == side_.width;
        return packed_sums(quads_, words, n, all ? 0 : first / kLanes,
                           all ? quads_.vectors() : (width + kLanes - 1) / kLanes, s_.halves, s_.step, rows,
                           out - first, pitch, ahead_);
      }
      in_place_ = false;
      expand(side_, keys_.page, keys_.page.value, chosen_, keys_.data_end, s_);
    }
    if constexpr (kIntegers) {
      if (integer_rows<false>(keys_, p, Scratch::kPitch, rows, n, s_))
        return integer_sums(s_.code_rows + begin, n, first, s_.integers, Scratch::kPitch, s_.step, rows, width, out,
                            pitch);
    }
    NothingAhead nothing;
    weighted_sum(s_.code_rows + begin, n, first, p, Scratch::kPitch, rows, width, out, pitch, nothing);
  }

 private:
  const PackedKeys& keys_;
  const KvSide& side_;
  const Chosen& chosen_;
  Scratch& s_;
  Quads quads_;
  FetchedAhead ahead_{};
  bool in_place_;
};

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
  if (chosen.whole) return {scale, zero};
  for (int64_t i = 0; i < chosen.n; ++i) {
    s.scale[i] = scale[s.rank[i]];
    s.zero[i] = zero[s.rank[i]];
  }
  for (int64_t i = chosen.n; i % kLanes; ++i) s.scale[i] = s.zero[i] = 0;
  return {s.scale, s.zero};
}

// Of every channel, in whole vectors.
void read_channels(const KvFormat& fmt, const KvSide& side, const KvHalf& half, int64_t slot, bool high, Scratch& s) {
  channel_parameters(fmt, side, half, slot, high, s.scale, s.zero);
  for (int64_t d = side.width; d < decode_pitch(side.width); ++d) s.scale[d] = s.zero[d] = 0;
}

// Whether logits can be had from the codes of the page as they are.
bool suits_packed_dots(const PackedKeys& keys, const Chosen& chosen) {
  const KvSide& side = keys.fmt->key;
  return kPackedDots && keys.integers && chosen.whole && !side.two_classes && !side.per_token && has_whole_words(side);
}

// Of keys with parameters along channels. False, having done nothing, if the queries suit no integers.
bool packed_key_logits(const DecodeRows& rows, const PackedKeys& keys, const Chosen& chosen, Scratch& s) {
  const KvSide& side = keys.fmt->key;
  const int64_t width = side.width, pitch = decode_pitch(width);
  // The values, with their parameters.
  const uint8_t* const half = keys.page.key.codes + keys.page.size / 2;
  FetchedAhead ahead{half, half + keys.page.size / 2};
  const int64_t bytes_each = (keys.page.size / 2 / ((chosen.n + 15) / 16) + 63) / 64 * 64;
  bool suits = true;
  chosen.each_segment(side, [&](const Segment& of) {
    read_channels(*keys.fmt, side, keys.page.key, of.slot, true, s);
    fold(rows.q, pitch, rows.count, s.scale, s.zero, pitch, s.folded, pitch, s.bias, s.largest);
    suits = suits && integer_rows<true>(keys, s.folded, pitch, rows.count, width, s);
    if (!suits) return;
    packed_dots(side, keys.page.key.codes + of.begin * side.row_bytes(true), of.end - of.begin, s.halves, s.step,
                s.bias, rows.count, s.logits + of.begin, Scratch::kPitch, ahead, bytes_each);
  });
  return suits;
}

void key_logits(const DecodeRows& rows, const PackedKeys& keys, const Chosen& chosen, Scratch& s) {
  const KvFormat& fmt = *keys.fmt;
  const KvSide& side = fmt.key;
  const int64_t width = side.width, pitch = decode_pitch(width);
  if (!side.per_token) {
    return chosen.each_segment(side, [&](const Segment& of) {
      read_channels(fmt, side, keys.page.key, of.slot, of.high, s);
      fold(rows.q, pitch, rows.count, s.scale, s.zero, pitch, s.folded, pitch, s.bias, s.largest);
      code_dots(keys, s.code_rows + of.begin, of.end - of.begin, 0, s.folded, rows.count, width, s.bias,
                s.logits + of.begin, s);
    });
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
      const int64_t shifted = shifted_from(side, of, first);
      for (int64_t r = 0; r < rows.count; ++r) {
        float unused;
        const float* const q = rows.q + r * pitch;
        s.bias[r] = sum_of(q + first, count, s.largest[r]);
        if (shifted != first) s.bias[r] = sum_of(q + shifted, first + count - shifted, unused);
      }
      code_dots(keys, s.code_rows, chosen.n, first, rows.q + first, rows.count, count, nullptr, s.weights, s);
      for (int64_t r = 0; r < rows.count; ++r) {
        float *const x = s.logits + r * Scratch::kPitch, *const dot = s.weights + r * Scratch::kPitch;
        for (int64_t i = 0; i < chosen.n; i += kLanes)
          store(x + i,
                load(x + i) + fma(load(dot + i), load(column.scale + i), splat(s.bias[r]) * load(column.zero + i)));
      }
    }
  }
}

void value_sums(const DecodeRows& rows, const PackedKeys& keys, const Chosen& chosen, const DecodeState& state,
                Scratch& s) {
  const KvFormat& fmt = *keys.fmt;
  const KvSide& side = fmt.value;
  const int64_t width = side.width, pitch = decode_pitch(width);
  CodeSums code_sums(keys, chosen, s);
  if (!side.per_token) {
    return chosen.each_segment(side, [&](const Segment& of) {
      read_channels(fmt, side, keys.page.value, of.slot, of.high, s);
      std::memset(s.sums, 0, size_t(rows.count * pitch) * sizeof(float));
      for (int64_t r = 0; r < rows.count; ++r)
        s.bias[r] = sum_of(s.logits + r * Scratch::kPitch + of.begin, of.end - of.begin, s.largest[r]);
      code_sums.add(of.begin, of.end, 0, s.logits + of.begin, rows.count, width, s.sums);
      for (int64_t r = 0; r < rows.count; ++r) {
        const vf total = splat(s.bias[r]);
        float *const sum = state.sum + r * pitch, *const more = s.sums + r * pitch;
        for (int64_t d = 0; d < width; d += kLanes)
          store(sum + d, load(sum + d) + fma(load(more + d), load(s.scale + d), total * load(s.zero + d)));
      }
    });
  }
  const int64_t whole = (chosen.n + kLanes - 1) / kLanes * kLanes;
  for (int part = 0; part < side.n_parts; ++part) {
    const KvPart& of = side.part[part];
    const int64_t groups = side.groups_of(of);
    read_table(fmt, side, keys.page.value, part, s);
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = of.first + g * side.group, left = of.first + of.channels - first;
      const int64_t count = left < side.group ? left : side.group;
      const Column column = read_column(chosen, g, s);
      fold(s.logits, Scratch::kPitch, rows.count, column.scale, column.zero, whole, s.weights, Scratch::kPitch, s.bias,
           s.largest);
      for (int64_t r = 0; r < rows.count; ++r)
        for (int64_t d = shifted_from(side, of, first); d < first + count; ++d) state.sum[r * pitch + d] += s.bias[r];
      code_sums.add(0, chosen.n, first, s.weights, rows.count, count, state.sum + first);
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
  value_sums(rows, keys, chosen, state, s);
}

}  // namespace
}  // namespace fastok::FASTOK_ISA
