// Packing: one page at a time, in cache: rows to fp32 in the codes' order and basis, statistics of the groups, codes.
// Sums are in ascending order and nothing is fused, so that the bytes are those of the specification.
#include "quantize/quantize.h"

#include <initializer_list>
#include <limits>

#include "quantize/coder_simd.h"
#include "quantize/unseal_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kMost = std::numeric_limits<float>::max();

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t pitch_of(int64_t width) { return (width + 15) / 16 * 16; }

struct Scratch {
  float* rows;        // [page][pitch]
  float *lo, *hi;     // per group: first its range, then what is subtracted
  float* step;        // the same
  Steps of_codes[2];  // of the low class and the high
  Bounds bounds;      // of 2-bit codes
  float* line;        // [2 * kMostChannels]

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
    float* next = rows + row_floats(fmt);
    for (float** array : {&lo, &hi, &step, &bounds.bound[0], &bounds.bound[1], &bounds.bound[2]})
      *array = next, next += n;
    for (Steps& steps : of_codes)
      for (float** array : {&steps.step, &steps.top, &steps.inverse, &steps.limit}) *array = next, next += n;
    line = next;
  }
};

size_t scratch_bytes(const KvFormat& fmt) {
  return size_t(Scratch::row_floats(fmt) + 14 * Scratch::groups(fmt) + 2 * kMostChannels) * sizeof(float);
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

template <class T>
void read_rows(const KvFormat& fmt, const KvSide& side, const KvRows& source, const KvChannels& channels, float* line,
               float* rows) {
  const int64_t width = side.width, pitch = pitch_of(width);
  const bool plain = !channels.factor && !channels.order && !side.part[0].fourier;
  for (int64_t t = 0; t < fmt.page; ++t) {
    float* const out = rows + t * pitch;
    const T* const x = static_cast<const T*>(source.data) + t * source.stride;
    // Short rows, far apart, are more than the hardware's own prefetcher foresees.
    for (int64_t d = 0; d < width; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + source.next + d);
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
               float* line, float* rows) {
  switch (dtype) {
    case Dtype::f16:
      return read_rows<f16>(fmt, side, source, channels, line, rows);
    case Dtype::bf16:
      return read_rows<bf16>(fmt, side, source, channels, line, rows);
    default:
      return read_rows<float>(fmt, side, source, channels, line, rows);
  }
}

// ---- parameters -----------------------------------------------------------------------------------------------------

// x in the scale dtype, rounded to nearest (0) or in a direction, NaN where out of range; `x` becomes what is stored.
template <class S, class Bits>
void write_scales(float* x, int64_t count, int direction, Bits infinity, Bits nan, uint8_t* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = smaller(count - i, kLanes);
    float exact[kLanes] = {}, stored[kLanes];
    Bits bits[kLanes];
    S rounded[kLanes];
    std::memcpy(exact, x + i, size_t(n) * sizeof(float));
    store(rounded, load(exact));
    store(stored, load(rounded));
    std::memcpy(bits, rounded, sizeof bits);
    for (int l = 0; l < kLanes; ++l) {
      const bool beyond = direction < 0 ? stored[l] > exact[l] : direction > 0 && stored[l] < exact[l];
      const Bits kept = beyond ? next_bits(bits[l], direction) : bits[l];
      bits[l] = (kept & infinity) == infinity ? nan : kept;
    }
    std::memcpy(rounded, bits, sizeof bits);
    store(stored, load(rounded));
    std::memcpy(out + i * int64_t(sizeof(S)), rounded, size_t(n) * sizeof(S));
    std::memcpy(x + i, stored, size_t(n) * sizeof(float));
  }
}

void write_scales(KvScale scale, float* x, int64_t count, int direction, uint8_t* out) {
  switch (scale) {
    case KvScale::f16:
      return write_scales<f16, uint16_t>(x, count, direction, 0x7c00, 0x7e00, out);
    case KvScale::bf16:
      return write_scales<bf16, uint16_t>(x, count, direction, 0x7f80, 0x7fc0, out);
    default:
      return write_scales<float, uint32_t>(x, count, direction, 0x7f800000, 0x7fc00000, out);
  }
}

inline bool finite(float x) { return (x < 0 ? -x : x) <= kMost; }

// Groups that could not be stored have zero 0.
void without_scale(const float* scale, int64_t count, float* zero, uint8_t* zeros, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    if (scale[i] == scale[i]) continue;
    zero[i] = 0;
    std::memset(zeros + i * size, 0, size_t(size));
  }
}

// Of each column of x[tokens][pitch]; bad[i] is NaN where not all of it is finite, else 0.
void ranges(const float* x, int64_t pitch, int64_t tokens, int64_t columns, float* lo, float* hi, float* bad) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    vf least[2], most[2], poison[2];  // of every other token, which there is an even number of
    for (int odd = 0; odd < 2; ++odd) {
      least[odd] = most[odd] = load(x + odd * pitch + i);
      poison[odd] = least[odd] * splat(0.0f);
    }
    for (int64_t t = 2; t < tokens; t += 2) {
      for (int odd = 0; odd < 2; ++odd) {
        const vf value = load(x + (t + odd) * pitch + i);
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
}

// The parameters of groups whose elements are x[t * pitch + i] for t in [0, tokens), i in [0, groups) (along channels),
// as they are stored in `arrays` at row `row`. Leaves in lo[i] what is subtracted first (trits: the threshold), and
// in of_codes[class] what codes are made with.
void channel_groups(const KvFormat& fmt, const KvSide& side, const KvPart& part, const float* x, int64_t pitch,
                    int64_t tokens, float gamma, int64_t row, int64_t rows, uint8_t* arrays, Scratch& s) {
  const int64_t n = part.channels, size = side.scale_bytes;
  uint8_t* const first = arrays + row * n * size;
  float* const __restrict lo = s.lo, * const __restrict hi = s.hi, * const __restrict step = s.step;
  if (part.kind == KvKind::affine) {
    float* const __restrict bad = s.line;
    ranges(x, pitch, tokens, n, lo, hi, bad);
    const float top = top_code(side, part, true);
    for (int64_t i = 0; i < n; ++i) lo[i] = bad[i] == 0 ? lo[i] + 0.0f : 0.0f;  // never -0
    write_scales(fmt.scale, lo, n, -1, first + rows * n * size);
    for (int64_t i = 0; i < n; ++i) {
      const float span = bad[i] == 0 ? hi[i] - lo[i] + 0.0f : std::numeric_limits<float>::quiet_NaN();
      step[i] = side.low_bits ? span : span / top;
    }
    write_scales(fmt.scale, step, n, 1, first);
    without_scale(step, n, lo, first + rows * n * size, size);
    if (fits_two_bits(side, part)) {
      for (int64_t i = 0; i < n; ++i) s.bounds.set(i, step[i]);
      return;
    }
    const float low_top = side.low_bits ? top_code(side, part, false) : 1.0f;
    for (int64_t i = 0; i < n; ++i) {
      s.of_codes[1].set(i, side.low_bits ? step[i] / top : step[i], top);
      if (side.low_bits) s.of_codes[0].set(i, step[i] / low_top, low_top);
    }
    return;
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
  write_scales(fmt.scale, step, n, 0, first);
  for (int64_t i = 0; i < n; ++i) s.of_codes[1].top[i] = step[i] == step[i] ? 1.0f : 0.0f;
}

// The same for the groups of channels of every token of a page: entry rank * groups + g, where `rank_of(t)` says which
// row of the arrays token t has.
template <class RankOf>
void token_groups(const KvFormat& fmt, const KvSide& side, const KvPart& part, const float* x, int64_t pitch,
                  const KvPage& page, const RankOf& rank_of, float gamma, uint8_t* arrays, Scratch& s) {
  const int64_t groups = side.groups_of(part), size = side.scale_bytes, count_all = fmt.page * groups;
  for (int64_t t = 0; t < fmt.page; ++t) {
    const float* const row = x + t * pitch;
    for (int64_t g = 0, at = rank_of(t) * groups; g < groups; ++g, ++at) {
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
  Steps& steps = s.of_codes[1];
  if (part.kind != KvKind::affine) {
    write_scales(fmt.scale, s.step, count_all, 0, arrays);
    for (int64_t i = 0; i < count_all; ++i) steps.top[i] = s.step[i] == s.step[i] ? 1.0f : 0.0f;
    return;
  }
  uint8_t* const zeros = arrays + count_all * size;
  const auto top_of = [&](int64_t i) { return top_code(side, part, i < page.n_high * groups); };
  write_scales(fmt.scale, s.lo, count_all, -1, zeros);
  for (int64_t i = 0; i < count_all; ++i) s.step[i] = (s.hi[i] - s.lo[i] + 0.0f) / top_of(i);
  write_scales(fmt.scale, s.step, count_all, 1, arrays);
  without_scale(s.step, count_all, s.lo, zeros, size);
  if (fits_two_bits(side, part)) {
    for (int64_t i = 0; i < count_all; ++i) s.bounds.set(i, s.step[i]);
    return;
  }
  for (int64_t i = 0; i < count_all; ++i) steps.set(i, s.step[i], top_of(i));
}

// ---- pages ----------------------------------------------------------------------------------------------------------

void seal_side(const KvFormat& fmt, const KvSide& side, const KvPage& page, KvHalf half, float gamma, Scratch& s) {
  const int64_t pitch = pitch_of(side.width);
  uint8_t* const codes = const_cast<uint8_t*>(half.codes);
  const int64_t high_bytes = side.row_bytes(true), low_bytes = side.low_bits ? side.row_bytes(false) : 0;
  int16_t rank_of[kMostPage];
  for (int64_t t = 0, n_high = 0, n_low = 0; t < fmt.page; ++t)
    rank_of[t] = int16_t(page.is_high(t) ? n_high++ : page.n_high + n_low++);
  uint8_t* arrays = const_cast<uint8_t*>(half.params);
  int64_t at = 0;  // of the part's bytes in a row
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part[i];
    const float* const x = s.rows + part.first;
    const int64_t groups = side.groups_of(part);
    if (side.per_token)
      token_groups(fmt, side, part, x, pitch, page, [&](int64_t t) { return int64_t(rank_of[t]); }, gamma, arrays, s);
    RowCodes row;
    std::memset(row.byte + part.channels, 0, 64);
    for (int64_t t = 0; t < fmt.page; ++t) {
      const bool high = page.is_high(t);
      if (!side.per_token && t % fmt.group == 0)
        channel_groups(fmt, side, part, x + t * pitch, pitch, fmt.group, gamma, t / fmt.group, half.param_rows, arrays,
                       s);
      const int64_t rank = rank_of[t];
      const float* const xs = x + t * pitch;
      uint8_t* const to =
          codes + (high ? rank * high_bytes : page.n_high * high_bytes + (rank - page.n_high) * low_bytes) + at;
      if (fits_two_bits(side, part)) {
        if (side.per_token) {
          const auto place_of = [&](int64_t c) { return rank * groups + c / side.group; };
          code_two_bits<true>(xs, part.channels, s.lo, s.bounds, place_of, to);
        } else {
          code_two_bits<false>(xs, part.channels, s.lo, s.bounds, [](int64_t c) { return c; }, to);
        }
        continue;
      }
      if (side.per_token) {
        for (int64_t g = 0, d = 0; d < part.channels; ++g, d += side.group)
          code(part.kind, xs + d, smaller(part.channels - d, side.group),
               SharedParameters(s.lo, s.of_codes[1], rank * groups + g), row.byte + d);
      } else {
        code(part.kind, xs, part.channels, OwnParameters(s.lo, s.of_codes[high]), row.byte);
      }
      pack_row(row.byte, high ? part.bits : side.low_bits, part.channels, to);
    }
    at += part.bytes();
    arrays += half.param_rows * part.arrays() * groups * side.scale_bytes;
  }
}

void seal(const KvFormat& fmt, Dtype dtype, const KvRows rows[2], const KvChannels channels[2], const float gamma[2],
          const uint8_t* classes, uint8_t* record, void* memory) {
  Scratch s(fmt, memory);
  int16_t counts[kMostTokenGroups];
  for (int64_t i = 0; i < fmt.token_groups; ++i) counts[i] = int16_t(fmt.page / fmt.token_groups);
  const KvPage page = KvPage::of(fmt, record, counts, classes);
  std::memset(record, 0, size_t(page.size));  // what aligns the parts
  for (int which = 0; which < 2; ++which) {
    const KvSide& side = which ? fmt.value : fmt.key;
    read_rows(fmt, side, dtype, rows[which], channels[which], s.line, s.rows);
    seal_side(fmt, side, page, which ? page.value : page.key, gamma[which], s);
  }
}

}  // namespace

extern const QuantizeKernels quantize_kernels;
const QuantizeKernels quantize_kernels = {scratch_bytes, seal, unseal};

}  // namespace fastok::FASTOK_ISA
