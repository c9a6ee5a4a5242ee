// Packing: one page at a time, in cache: rows to fp32 in the codes' order and basis, statistics of the groups, codes.
// Sums are in ascending order and nothing is fused, so that the bytes are those of the specification.
#include "quantize/quantize.h"

#include <initializer_list>

#include "quantize/coder_simd.h"
#include "quantize/keys_simd.h"
#include "quantize/unseal_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t pitch_of(int64_t width) { return (width + 15) / 16 * 16; }

struct Scratch {
  float* rows;        // [page][pitch]
  int16_t* keys;      // [page][width], instead
  float *lo, *hi;     // per group: first its range, then what is subtracted
  float* step;        // the same
  Steps of_codes[2];  // of the low class and the high
  Bounds bounds;      // of 2-bit codes
  int16_t* last[3];   // the last keys that are not above them
  int16_t *least, *most;
  float* line;  // [2 * kMostChannels]

  static int64_t groups(const KvFormat& fmt) {
    int64_t most = kMostChannels;
    for (const KvSide* side : {&fmt.key, &fmt.value})
      if (const int64_t n = fmt.page * ((side->width + side->group - 1) / side->group); side->per_token && n > most)
        most = n;
    return (most + kLanes - 1) / kLanes * kLanes;
  }
  static int64_t row_floats(const KvFormat& fmt) { return fmt.page * pitch_of(fmt.key.width); }

  Scratch(const KvFormat& fmt, void* memory) {
    const int64_t n = groups(fmt);
    rows = static_cast<float*>(memory);
    keys = static_cast<int16_t*>(memory);
    float* next = rows + row_floats(fmt);
    for (float** array : {&lo, &hi, &step, &bounds.bound[0], &bounds.bound[1], &bounds.bound[2]})
      *array = next, next += n;
    for (Steps& steps : of_codes)
      for (float** array : {&steps.step, &steps.top, &steps.inverse, &steps.limit}) *array = next, next += n;
    line = next;
    int16_t* of_keys = reinterpret_cast<int16_t*>(line + 2 * kMostChannels);
    for (int16_t** array : {&last[0], &last[1], &last[2], &least, &most}) *array = of_keys, of_keys += n;
  }
};

size_t scratch_bytes(const KvFormat& fmt) {
  const int64_t floats = Scratch::row_floats(fmt) + 14 * Scratch::groups(fmt) + 2 * kMostChannels;
  return size_t(floats) * sizeof(float) + size_t(5 * Scratch::groups(fmt)) * sizeof(int16_t);
}

template <class T>
void widen_row(const T* x, int64_t width, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, load(x + d));
  for (; d < width; ++d) out[d] = widen(x[d]);
}

// x[n] times the basis, each component summed in ascending order.
void to_spectrum(const float* x, const float* basis, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = x[0] * basis[j];
  for (int64_t i = 1; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) out[j] += x[i] * basis[i * n + j];
}

// Token t's to row place[t].
template <class T>
void read_rows(const KvFormat& fmt, const KvSide& side, const KvRows& source, const KvChannels& channels,
               const int16_t* place, float* line, float* rows) {
  const int64_t width = side.width, pitch = pitch_of(width);
  const bool plain = !channels.factor && !channels.order && !side.part[0].fourier;
  for (int64_t t = 0; t < fmt.page; ++t) {
    float* const out = rows + place[t] * pitch;
    const T* const x = static_cast<const T*>(source.data) + t * source.stride;
    // Short rows, far apart, are more than the hardware's own prefetcher foresees.
    const T* const ahead = static_cast<const T*>(source.ahead) + t * source.ahead_stride;
    for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(ahead + d, 0, 2);
    widen_row(x, width, plain ? out : line);
    if (plain) continue;
    if (channels.factor)
      for (int64_t d = 0; d < width; ++d) line[d] /= widen(channels.factor[d]);
    float* const coded = line + kMostChannels;
    for (int64_t d = 0; d < width; ++d) coded[d] = channels.order ? line[channels.order[d]] : line[d];
    const int64_t easy = side.part[0].fourier ? side.part[0].channels : 0;
    if (easy > 0) to_spectrum(coded, channels.basis, easy, out);
    std::memcpy(out + easy, coded + easy, size_t(width - easy) * sizeof(float));
  }
}

void read_rows(const KvFormat& fmt, const KvSide& side, Dtype dtype, const KvRows& source, const KvChannels& channels,
               const int16_t* place, float* line, float* rows) {
  switch (dtype) {
    case Dtype::f16:
      return read_rows<f16>(fmt, side, source, channels, place, line, rows);
    case Dtype::bf16:
      return read_rows<bf16>(fmt, side, source, channels, place, line, rows);
    default:
      return read_rows<float>(fmt, side, source, channels, place, line, rows);
  }
}

// ---- parameters -----------------------------------------------------------------------------------------------------

// x in the scale dtype, rounded to nearest (0) or in a direction, NaN where out of range; `x` becomes what is stored.
// Reads and writes up to kLanes - 1 more of x.
template <class S, class Key>
void write_scales(float* x, int64_t count, int direction, Key infinity, Key nan, uint8_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    float exact[kLanes], stored[kLanes];
    Key key[kLanes];
    S rounded[kLanes];
    const vf all = load(x + i);
    store(exact, all);
    store(rounded, all);
    store(stored, load(rounded));
    std::memcpy(key, rounded, sizeof key);
    for (int l = 0; l < kLanes; ++l) {
      const bool beyond = direction < 0 ? stored[l] > exact[l] : direction > 0 && stored[l] < exact[l];
      const Key kept = Key(key_of(key[l]) + (beyond ? direction : 0));
      key[l] = kept >= infinity || kept <= Key(~infinity) ? nan : key_of(kept);
    }
    std::memcpy(rounded, key, sizeof key);
    store(x + i, load(rounded));
    if (count - i >= kLanes) {
      std::memcpy(out + i * int64_t(sizeof(S)), rounded, sizeof rounded);
    } else {
      std::memcpy(out + i * int64_t(sizeof(S)), rounded, size_t(count - i) * sizeof(S));
    }
  }
}

void write_scales(KvScale scale, float* x, int64_t count, int direction, uint8_t* out) {
  switch (scale) {
    case KvScale::f16:
      return write_scales<f16>(x, count, direction, int16_t(0x7c00), int16_t(0x7e00), out);
    case KvScale::bf16:
      return write_scales<bf16>(x, count, direction, int16_t(0x7f80), int16_t(0x7fc0), out);
    default:
      return write_scales<float>(x, count, direction, int32_t(0x7f800000), int32_t(0x7fc00000), out);
  }
}

inline bool finite(float x) { return (x < 0 ? -x : x) <= kMost; }

// Groups that could not be stored have zero 0. Reads up to kLanes - 1 more.
void without_scale(const float* scale, int64_t count, float* zero, uint8_t* zeros, int64_t size) {
  for (int64_t i = 0; i < count; i += kLanes) {
    if (!any(unordered(load(scale + i)))) continue;
    for (int64_t j = i; j < smaller(count, i + kLanes); ++j) {
      if (scale[j] == scale[j]) continue;
      zero[j] = 0;
      std::memset(zeros + j * size, 0, size_t(size));
    }
  }
}

// Of each column of x[tokens][pitch], of which there is one at least, 0 and inf where not all of it is finite. `bad` is
// scratch.
void ranges(const float* x, int64_t pitch, int64_t tokens, int64_t columns, float* lo, float* hi, float* bad) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    vf least[2], most[2], poison[2];  // of every other token; of an odd number the last counts twice
    const auto at = [&](int64_t t) { return load(x + smaller(t, tokens - 1) * pitch + i); };
    for (int odd = 0; odd < 2; ++odd) {
      least[odd] = most[odd] = at(odd);
      poison[odd] = least[odd] * splat(0.0f);
    }
    for (int64_t t = 2; t < tokens; t += 2) {
      for (int odd = 0; odd < 2; ++odd) {
        const vf value = at(t + odd);
        least[odd] = select(greater(least[odd], value), value, least[odd]);
        most[odd] = maximum(most[odd], value);
        poison[odd] = fma(value, splat(0.0f), poison[odd]);
      }
    }
    store(lo + i, select(greater(least[0], least[1]), least[1], least[0]));
    store(hi + i, maximum(most[0], most[1]));
    store(bad + i, poison[0] + poison[1]);
  }
  for (; i < columns; ++i) {
    lo[i] = hi[i] = x[i], bad[i] = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const float value = x[t * pitch + i];
      lo[i] = value < lo[i] ? value : lo[i];
      hi[i] = value > hi[i] ? value : hi[i];
      bad[i] += value * 0.0f;
    }
  }
  for (i = 0; i < columns; ++i) {
    hi[i] = bad[i] == 0 ? hi[i] : std::numeric_limits<float>::infinity();
    lo[i] = bad[i] == 0 ? lo[i] + 0.0f : 0.0f;  // never -0
  }
}

// From the ranges in s.lo and s.hi to the parameters of groups along channels, as they are stored in `arrays` at row
// `row`. Leaves in s.lo what is subtracted first, and in s.bounds or s.of_codes[class] what codes are made with.
void close_channels(const KvFormat& fmt, const KvSide& side, const KvPart& part, int64_t row, int64_t rows,
                    uint8_t* arrays, Scratch& s) {
  const int64_t n = part.channels, size = side.scale_bytes;
  uint8_t* const first = arrays + row * n * size;
  float* const __restrict lo = s.lo, * const __restrict hi = s.hi, * const __restrict step = s.step;
  const bool shares = side.shares_ranges();
  const float top = top_code(part), low_top = shares ? top_code(side.low) : 1.0f;
  write_scales(fmt.scale, lo, n, -1, first + rows * n * size);
  for (int64_t i = 0; i < n; ++i) {
    const float span = hi[i] - lo[i] + 0.0f;
    step[i] = shares ? span : span / top;
  }
  write_scales(fmt.scale, step, n, 1, first);
  without_scale(step, n, lo, first + rows * n * size, size);
  if (fits_two_bits(side, part)) {
    s.bounds.set(step, n);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    s.of_codes[1].set(i, shares ? step[i] / top : step[i], top);
    if (shares) s.of_codes[0].set(i, step[i] / low_top, low_top);
  }
}

// The same of groups along tokens, entry rank * groups + g.
void close_tokens(const KvFormat& fmt, const KvSide& side, const KvPart& part, const KvPage& page, uint8_t* arrays,
                  Scratch& s) {
  const int64_t groups = side.groups_of(part), count = fmt.page * groups, size = side.scale_bytes;
  uint8_t* const zeros = arrays + count * size;
  const auto top_of = [&](int64_t i) {
    return top_code(side.two_classes && i >= page.n_high * groups ? side.low : part);
  };
  write_scales(fmt.scale, s.lo, count, -1, zeros);
  for (int64_t i = 0; i < count; ++i) s.step[i] = (s.hi[i] - s.lo[i] + 0.0f) / top_of(i);
  write_scales(fmt.scale, s.step, count, 1, arrays);
  without_scale(s.step, count, s.lo, zeros, size);
  if (fits_two_bits(side, part)) {
    s.bounds.set(s.step, count);
    return;
  }
  for (int64_t i = 0; i < count; ++i) s.of_codes[1].set(i, s.step[i], top_of(i));
}

// The parameters of groups whose elements are x[t * pitch + i] for t in [0, tokens), i in [0, groups) (along channels).
// Leaves in s.lo what is subtracted first (trits: the threshold), and what codes are made with as close_channels does.
void channel_groups(const KvFormat& fmt, const KvSide& side, const KvPart& part, const float* x, int64_t pitch,
                    int64_t tokens, float gamma, int64_t row, int64_t rows, uint8_t* arrays, Scratch& s) {
  const int64_t n = part.channels;
  float* const __restrict lo = s.lo, * const __restrict hi = s.hi, * const __restrict step = s.step;
  if (part.kind == KvKind::affine) {
    ranges(x, pitch, tokens, n, lo, hi, s.line);
    return close_channels(fmt, side, part, row, rows, arrays, s);
  }
  float* const __restrict mean = lo;
  for (int64_t i = 0; i < n; ++i) mean[i] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const float* const __restrict at = x + t * pitch;
    for (int64_t i = 0; i < n; ++i) mean[i] += magnitude(at[i]);
  }
  for (int64_t i = 0; i < n; ++i) mean[i] = finite(mean[i]) ? mean[i] / float(tokens) : kMost * 2;
  for (int64_t i = 0; i < n; ++i) step[i] = mean[i];
  if (part.kind == KvKind::trit) {
    float* const __restrict total = s.line, * const __restrict count = hi;
    for (int64_t i = 0; i < n; ++i) mean[i] *= gamma, total[i] = count[i] = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* const __restrict at = x + t * pitch;
      for (int64_t i = 0; i < n; ++i) {
        const float size_of = magnitude(at[i]);
        total[i] += size_of > mean[i] ? size_of : 0.0f;
        count[i] += size_of > mean[i] ? 1.0f : 0.0f;
      }
    }
    if (!side.compat)
      for (int64_t i = 0; i < n; ++i) step[i] = finite(step[i]) ? total[i] / (count[i] > 1 ? count[i] : 1) : kMost * 2;
  }
  write_scales(fmt.scale, step, n, 0, arrays + row * n * side.scale_bytes);
  for (int64_t i = 0; i < n; ++i) s.of_codes[1].top[i] = step[i] == step[i] ? 1.0f : 0.0f;
}

// The same for the groups of channels of every row of a page: entry rank[row] * groups + g.
void token_groups(const KvFormat& fmt, const KvSide& side, const KvPart& part, const float* x, int64_t pitch,
                  const KvPage& page, const int16_t* rank, float gamma, uint8_t* arrays, Scratch& s) {
  const int64_t groups = side.groups_of(part), count_all = fmt.page * groups;
  for (int64_t t = 0; t < fmt.page; ++t) {
    const float* const row = x + t * pitch;
    for (int64_t g = 0, at = rank[t] * groups; g < groups; ++g, ++at) {
      const int64_t begin = g * side.group, end = smaller(begin + side.group, part.channels);
      if (part.kind == KvKind::affine) {
        float lo = row[begin], hi = row[begin], bad = 0;
        int64_t d = begin;
        if (end - begin >= kLanes) {
          vf least = load(row + begin), most = least, poison = least * splat(0.0f);
          for (d += kLanes; d + kLanes <= end; d += kLanes) {
            const vf value = load(row + d);
            least = select(greater(least, value), value, least);
            most = maximum(most, value);
            poison = fma(value, splat(0.0f), poison);
          }
          lo = -horizontal_max(splat(0.0f) - least);
          hi = horizontal_max(most);
          bad = any(unordered(poison)) ? 1.0f : 0.0f;
        }
        for (; d < end; ++d) {
          lo = row[d] < lo ? row[d] : lo;
          hi = row[d] > hi ? row[d] : hi;
          bad += row[d] * 0.0f;
        }
        s.lo[at] = bad == 0 ? lo + 0.0f : 0.0f;  // never -0
        s.hi[at] = bad == 0 ? hi : kMost * 2;
        continue;
      }
      float sum = 0, total = 0, count = 0;
      for (int64_t d = begin; d < end; ++d) sum += magnitude(row[d]);
      const float mean = finite(sum) ? sum / float(end - begin) : kMost * 2;
      s.lo[at] = mean * gamma;
      for (int64_t d = begin; d < end && part.kind == KvKind::trit; ++d) {
        total += magnitude(row[d]) > s.lo[at] ? magnitude(row[d]) : 0.0f;
        count += magnitude(row[d]) > s.lo[at] ? 1.0f : 0.0f;
      }
      const bool means = part.kind == KvKind::sign || side.compat || !finite(mean);
      s.step[at] = means ? mean : total / (count > 1 ? count : 1);
    }
  }
  if (part.kind == KvKind::affine) return close_tokens(fmt, side, part, page, arrays, s);
  write_scales(fmt.scale, s.step, count_all, 0, arrays);
  for (int64_t i = 0; i < count_all; ++i) s.of_codes[1].top[i] = s.step[i] == s.step[i] ? 1.0f : 0.0f;
}

// ---- pages ----------------------------------------------------------------------------------------------------------

// The order of a page's tokens in its record, and the order as it is.
struct Ranks {
  int16_t of[kMostPage], same[kMostPage];

  explicit Ranks(const KvFormat& fmt, const KvPage& page) {
    for (int64_t t = 0, n_high = 0, n_low = 0; t < fmt.page; ++t) {
      of[t] = int16_t(page.is_high(t) ? n_high++ : page.n_high + n_low++);
      same[t] = int16_t(t);
    }
  }
};

// Rows [begin, end), of which `group` have their parameters along channels in common.
struct Run {
  const KvPart& part;
  int64_t begin, end, group;
  uint8_t* arrays;
  int64_t array_rows;
};

// Writes the codes of row t to to(t), as codes of bits_of(t) bits.
template <class To, class BitsOf>
void seal_run(const KvFormat& fmt, const KvSide& side, const KvPage& page, const Run& run, const int16_t* rank,
              float gamma, const To& to, const BitsOf& bits_of, Scratch& s) {
  const KvPart& part = run.part;
  const float* const x = s.rows + part.first;
  const int64_t pitch = pitch_of(side.width), groups = side.groups_of(part);
  if (side.per_token) token_groups(fmt, side, part, x, pitch, page, rank, gamma, run.arrays, s);
  RowCodes row;
  std::memset(row.byte + part.channels, 0, 64);
  for (int64_t t = run.begin; t < run.end; ++t) {
    const float* const xs = x + t * pitch;
    if (!side.per_token && (t - run.begin) % run.group == 0)
      channel_groups(fmt, side, part, xs, pitch, run.group, gamma, (t - run.begin) / run.group, run.array_rows,
                     run.arrays, s);
    if (fits_two_bits(side, part)) {
      if (side.per_token) {
        const auto place_of = [&](int64_t c) { return rank[t] * groups + c / side.group; };
        code_two_bits<true>(xs, part.channels, s.lo, s.bounds, place_of, to(t));
      } else {
        code_two_bits<false>(xs, part.channels, s.lo, s.bounds, [](int64_t c) { return c; }, to(t));
      }
      continue;
    }
    if (side.per_token) {
      for (int64_t g = 0, d = 0; d < part.channels; ++g, d += side.group)
        code(part.kind, xs + d, smaller(part.channels - d, side.group),
             SharedParameters(s.lo, s.of_codes[1], rank[t] * groups + g), row.byte + d);
    } else {
      const bool low = side.shares_ranges() && t >= page.n_high;
      code(part.kind, xs, part.channels, OwnParameters(s.lo, s.of_codes[low ? 0 : 1]), row.byte);
    }
    pack_row(row.byte, bits_of(t), part.channels, to(t));
  }
}

// From rows in the order of the record where the side has two classes, else of the tokens.
void seal_side(const KvFormat& fmt, const KvSide& side, const KvPage& page, KvHalf half, const Ranks& ranks,
               float gamma, Scratch& s) {
  uint8_t* const codes = const_cast<uint8_t*>(half.codes);
  uint8_t* arrays = const_cast<uint8_t*>(half.params);
  const int16_t* const rank = side.two_classes ? ranks.same : ranks.of;
  const int64_t bytes = side.row_bytes(true);
  if (side.two_classes) {
    const auto to = [&](int64_t t) {
      const int64_t high = smaller(t, page.n_high);
      return codes + high * bytes + (t - high) * side.low.bytes();
    };
    const auto bits_of = [&](int64_t t) { return (t < page.n_high ? side.part[0] : side.low).bits; };
    const auto run = [&](const Run& of) { seal_run(fmt, side, page, of, rank, gamma, to, bits_of, s); };
    if (!side.own_arrays) return run({side.part[0], 0, fmt.page, fmt.group, arrays, half.param_rows});
    run({side.part[0], 0, page.n_high, page.n_high, arrays, 1});
    return run({side.low, page.n_high, fmt.page, fmt.page - page.n_high, const_cast<uint8_t*>(half.low_params), 1});
  }
  int64_t at = 0;  // of the part's bytes in a row
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part[i];
    seal_run(
        fmt, side, page, {part, 0, fmt.page, fmt.group, arrays, half.param_rows}, rank, gamma,
        [&](int64_t t) { return codes + rank[t] * bytes + at; }, [&](int64_t) { return part.bits; }, s);
    at += part.bytes();
    arrays += half.param_rows * part.arrays() * side.groups_of(part) * side.scale_bytes;
  }
}

// Whether seal_keys does it: 2 bits for all channels, of 16-bit numbers as they are.
bool fits_keys(const KvFormat& fmt, const KvSide& side, Dtype dtype, const KvChannels& channels) {
  return dtype != Dtype::f32 && !fmt.two_classes && side.n_parts == 1 && fits_two_bits(side, side.part[0]) &&
         !channels.factor && !channels.order && side.width % (2 * kKeys) == 0 &&
         (!side.per_token || side.group % kKeys == 0);
}

// As read_rows and seal_side, on the numbers' keys. V: of as many as divide a quarter of the row.
template <class T, class V>
void seal_keys(const KvFormat& fmt, const KvSide& side, const KvPage& page, const KvRows& source, KvHalf half,
               Scratch& s) {
  const KvPart& part = side.part[0];
  const int64_t width = side.width, per_row = side.groups_of(part);
  uint8_t* const codes = const_cast<uint8_t*>(half.codes);
  uint8_t* const arrays = const_cast<uint8_t*>(half.params);
  const auto to_numbers = [&](int64_t count) { ends_of<T>(s.least, s.most, count, s.lo, s.hi); };
  const auto to_keys = [&](int64_t count) {
    for (int k = 0; k < 3; ++k) last_below<T>(s.lo, s.bounds.bound[k], count, s.last[k]);
  };
  if (side.per_token) {
    read_rows(KeyReader(source, 0, width, s.keys), fmt.page, width, side.group, s.least, s.most);
    to_numbers(fmt.page * per_row);
    close_tokens(fmt, side, part, page, arrays, s);
    to_keys(fmt.page * per_row);
    fetch_rest(source, 0, fmt.page, width);
    code_rows<V>(s.keys, fmt.page, width, side.group, s.last, codes);
    return;
  }
  for (int64_t t = 0; t < fmt.page; t += fmt.group) {
    read_columns(KeyReader(source, t, width, s.keys), fmt.group, width, s.least, s.most);
    to_numbers(width);
    close_channels(fmt, side, part, t / fmt.group, half.param_rows, arrays, s);
    to_keys(width);
    fetch_rest(source, t, fmt.group, width);
    code_columns<V>(s.keys + t * width, fmt.group, width, s.last, codes + t * part.bytes());
  }
}

template <class T>
void seal_keys(const KvFormat& fmt, const KvSide& side, const KvPage& page, const KvRows& source, KvHalf half,
               Scratch& s) {
  const bool whole = side.width % (4 * kKeys) == 0;
  const auto seal_with = whole ? seal_keys<T, Keys<kKeys>> : seal_keys<T, Keys<kKeys / 2>>;
  seal_with(fmt, side, page, source, half, s);
}

// What aligns the parts of a side's half of the record.
void clear_gaps(const KvSide& side, const KvPage& page, KvHalf half) {
  const int64_t low = page.n - page.n_high, params = side.params_size(page.n_high, low, page.filled);
  const int64_t codes = page.n_high * side.row_bytes(true) + low * side.row_bytes(false);
  std::memset(const_cast<uint8_t*>(half.codes) + codes, 0, size_t(kv_aligned(codes) - codes));
  std::memset(const_cast<uint8_t*>(half.params) + params, 0, size_t(kv_aligned(params) - params));
}

void seal(const KvFormat& fmt, Dtype dtype, const KvRows rows[2], const KvChannels channels[2], const float gamma[2],
          const uint8_t* classes, uint8_t* record, void* memory) {
  Scratch s(fmt, memory);
  int16_t counts[kMostTokenGroups];
  for (int64_t i = 0; i < fmt.token_groups; ++i) counts[i] = int16_t(fmt.page / fmt.token_groups);
  const KvPage page = KvPage::of(fmt, record, counts, classes);
  const Ranks ranks(fmt, page);
  for (int which = 0; which < 2; ++which) {
    const KvSide& side = which ? fmt.value : fmt.key;
    const KvHalf half = which ? page.value : page.key;
    clear_gaps(side, page, half);
    if (fits_keys(fmt, side, dtype, channels[which])) {
      if (dtype == Dtype::f16)
        seal_keys<f16>(fmt, side, page, rows[which], half, s);
      else
        seal_keys<bf16>(fmt, side, page, rows[which], half, s);
      continue;
    }
    const int16_t* const place = side.two_classes ? ranks.of : ranks.same;
    read_rows(fmt, side, dtype, rows[which], channels[which], place, s.line, s.rows);
    seal_side(fmt, side, page, half, ranks, gamma[which], s);
  }
}

}  // namespace

extern const QuantizeKernels quantize_kernels;
const QuantizeKernels quantize_kernels = {scratch_bytes, seal, unseal};

}  // namespace fastok::FASTOK_ISA
