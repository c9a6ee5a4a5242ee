// One page at a time, in cache: rows to fp32 in the codes' order and basis, statistics of the groups, codes. Sums are
// in ascending order and nothing is fused, so that the bytes are those of the specification.
#include "quantize/quantize.h"

#include "quantize/codes_simd.h"

namespace fastok::FASTOK_ISA {
namespace {

constexpr float kMost = std::numeric_limits<float>::max();

int64_t pitch_of(int64_t width) { return (width + 15) / 16 * 16; }

struct Scratch {
  float* rows;     // [page][pitch]
  float *lo, *hi;  // [kMostChannels] per group along channels, and what comes of them
  float *step, *top;
  float* line;  // [2 * kMostChannels]

  Scratch(const KvFormat& fmt, void* memory) {
    rows = static_cast<float*>(memory);
    lo = rows + fmt.page * pitch_of(fmt.key.width);
    hi = lo + kMostChannels;
    step = hi + kMostChannels;
    top = step + kMostChannels;
    line = top + kMostChannels;
  }
};

size_t scratch_bytes(const KvFormat& fmt) {
  return size_t(fmt.page * pitch_of(fmt.key.width) + 6 * kMostChannels) * sizeof(float);
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

// ---- parameters
// ------------------------------------------------------------------------------------------------------

// One step towards -inf (direction < 0) or inf, on sign-and-magnitude bits.
template <class Bits>
inline Bits next_bits(Bits bits, int direction) {
  constexpr Bits kSign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  const bool negative = bits & kSign;
  if ((bits & Bits(~kSign)) == 0) return direction < 0 ? Bits(kSign | 1) : Bits(1);
  return negative == (direction < 0) ? Bits(bits + 1) : Bits(bits - 1);
}

// x in the scale dtype, rounded to nearest (0) or in a direction, NaN where out of range; `x` becomes what is stored.
template <class S, class Bits>
void write_scales(float* x, int64_t count, int direction, Bits infinity, Bits nan, uint8_t* out) {
  int64_t i = 0;
  S* const to = reinterpret_cast<S*>(out);
  for (; i < count; i += kLanes) {
    S rounded[kLanes];
    float back[kLanes] = {};
    const int64_t n = count - i < kLanes ? count - i : kLanes;
    std::memcpy(back, x + i, size_t(n) * sizeof(float));
    store(rounded, load(back));
    float exact[kLanes];
    std::memcpy(exact, back, sizeof exact);
    store(back, load(rounded));
    for (int l = 0; l < kLanes; ++l) {
      Bits bits;
      std::memcpy(&bits, &rounded[l], sizeof bits);
      const bool beyond = direction < 0 ? back[l] > exact[l] : direction > 0 ? back[l] < exact[l] : false;
      if (beyond) bits = next_bits(bits, direction);
      if ((bits & infinity) == infinity) bits = nan;
      std::memcpy(&rounded[l], &bits, sizeof bits);
    }
    store(back, load(rounded));
    std::memcpy(to + i, rounded, size_t(n) * sizeof(S));
    std::memcpy(x + i, back, size_t(n) * sizeof(float));
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
inline float magnitude(float x) { return float_of(bits_of(x) & 0x7fffffff); }

// The parameters of groups whose elements are x[t * pitch + i] for t in [0, tokens), i in [0, groups) (along channels),
// as they are stored in `arrays` at row `row`. Leaves in step[i] what a code counts, in lo[i] what is subtracted first,
// and in top[i] the largest code, 0 where there are none.
void channel_groups(const KvFormat& fmt, const KvSide& side, const KvPart& part, const float* x, int64_t pitch,
                    int64_t tokens, float gamma, int64_t row, int64_t rows, uint8_t* arrays, Scratch& s) {
  const int64_t n = part.channels, size = side.scale_bytes;
  uint8_t* const first = arrays + row * n * size;
  if (part.kind == KvKind::affine) {
    float* const bad = s.line;
    for (int64_t i = 0; i < n; ++i) s.lo[i] = s.hi[i] = x[i], bad[i] = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* const at = x + t * pitch;
      for (int64_t i = 0; i < n; ++i) {
        s.lo[i] = at[i] < s.lo[i] ? at[i] : s.lo[i];
        s.hi[i] = at[i] > s.hi[i] ? at[i] : s.hi[i];
        bad[i] += at[i] * 0.0f;  // NaN once anything is not finite
      }
    }
    const float top = top_code(side, part, true);
    for (int64_t i = 0; i < n; ++i) s.lo[i] = bad[i] == 0 ? s.lo[i] : 0.0f;
    write_scales(fmt.scale, s.lo, n, -1, first + rows * n * size);
    for (int64_t i = 0; i < n; ++i) {
      const float span = bad[i] == 0 ? s.hi[i] - s.lo[i] : std::numeric_limits<float>::quiet_NaN();
      s.step[i] = side.low_bits ? span : span / top;
    }
    write_scales(fmt.scale, s.step, n, 1, first);
    for (int64_t i = 0; i < n; ++i) {
      if (s.step[i] != s.step[i]) {
        s.lo[i] = 0;
        std::memset(first + (rows * n + i) * size, 0, size_t(size));
      }
      s.top[i] = s.step[i] > 0 ? top : 0.0f;
    }
    return;
  }
  float* const mean = s.lo;
  for (int64_t i = 0; i < n; ++i) mean[i] = 0;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < n; ++i) mean[i] += magnitude(x[t * pitch + i]);
  for (int64_t i = 0; i < n; ++i) mean[i] = finite(mean[i]) ? mean[i] / float(tokens) : kMost * 2;
  for (int64_t i = 0; i < n; ++i) s.step[i] = mean[i];
  if (part.kind == KvKind::trit) {
    float *const total = s.line, *const count = s.hi;
    for (int64_t i = 0; i < n; ++i) mean[i] *= gamma, total[i] = count[i] = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        const float size_of = magnitude(x[t * pitch + i]);
        total[i] += size_of > mean[i] ? size_of : 0.0f;
        count[i] += size_of > mean[i] ? 1.0f : 0.0f;
      }
    }
    if (!side.compat)
      for (int64_t i = 0; i < n; ++i)
        s.step[i] = finite(s.step[i]) ? total[i] / (count[i] > 1 ? count[i] : 1) : kMost * 2;
  }
  write_scales(fmt.scale, s.step, n, 0, first);
  for (int64_t i = 0; i < n; ++i) s.top[i] = s.step[i] == s.step[i] ? 1.0f : 0.0f;
}

// The same for the groups of one token: s.lo, s.step and s.top of each group.
void token_groups(const KvFormat& fmt, const KvSide& side, const KvPart& part, const float* x, bool high, float gamma,
                  int64_t row, int64_t rows, uint8_t* arrays, Scratch& s) {
  const int64_t groups = side.groups_of(part), size = side.scale_bytes;
  uint8_t* const first = arrays + row * groups * size;
  const float top = part.kind == KvKind::affine ? top_code(side, part, high) : 1.0f;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = g * side.group, end = begin + side.group < part.channels ? begin + side.group : part.channels;
    if (part.kind == KvKind::affine) {
      float lo = x[begin], hi = x[begin], bad = 0;
      int64_t d = begin;
      if (end - begin >= kLanes) {
        vf least = load(x + begin), most = least, poison = least * splat(0.0f);
        for (d += kLanes; d + kLanes <= end; d += kLanes) {
          const vf value = load(x + d);
          least = select(greater(least, value), value, least);
          most = maximum(most, value);
          poison = fma(value, splat(0.0f), poison);
        }
        lo = -horizontal_max(splat(0.0f) - least);
        hi = horizontal_max(most);
        bad = horizontal_sum(poison);
      }
      for (; d < end; ++d) {
        lo = x[d] < lo ? x[d] : lo;
        hi = x[d] > hi ? x[d] : hi;
        bad += x[d] * 0.0f;
      }
      s.lo[g] = bad == 0 ? lo : 0.0f;
      s.hi[g] = bad == 0 ? hi : kMost * 2;
      continue;
    }
    float sum = 0, total = 0, count = 0;
    for (int64_t d = begin; d < end; ++d) sum += magnitude(x[d]);
    const float mean = finite(sum) ? sum / float(end - begin) : kMost * 2;
    s.lo[g] = mean * gamma;
    for (int64_t d = begin; d < end && part.kind == KvKind::trit; ++d) {
      total += magnitude(x[d]) > s.lo[g] ? magnitude(x[d]) : 0.0f;
      count += magnitude(x[d]) > s.lo[g] ? 1.0f : 0.0f;
    }
    const bool means = part.kind == KvKind::sign || side.compat || !finite(mean);
    s.step[g] = means ? mean : total / (count > 1 ? count : 1);
  }
  if (part.kind != KvKind::affine) {
    write_scales(fmt.scale, s.step, groups, 0, first);
    for (int64_t g = 0; g < groups; ++g) s.top[g] = s.step[g] == s.step[g] ? 1.0f : 0.0f;
    return;
  }
  uint8_t* const zeros = first + rows * groups * size;
  write_scales(fmt.scale, s.lo, groups, -1, zeros);
  for (int64_t g = 0; g < groups; ++g) s.step[g] = (s.hi[g] - s.lo[g]) / top;
  write_scales(fmt.scale, s.step, groups, 1, first);
  for (int64_t g = 0; g < groups; ++g) {
    if (s.step[g] != s.step[g]) {
      s.lo[g] = 0;
      std::memset(zeros + g * size, 0, size_t(size));
    }
    s.top[g] = s.step[g] > 0 ? top : 0.0f;
  }
}

// ---- codes
// -----------------------------------------------------------------------------------------------------------

constexpr float kRound = 0x1p23f;  // adding it rounds to an integer, half to even

// Of `count` elements with their own parameters.
void code_row(KvKind kind, const float* x, int64_t count, const float* lo, const float* step, const float* top,
              uint8_t* codes) {
  if (kind == KvKind::affine) {
    for (int64_t i = 0; i < count; ++i) {
      float y = (x[i] - lo[i]) / (step[i] > 0 ? step[i] : 1.0f);
      y = y > 0 ? y : 0.0f;
      y = y < top[i] ? y : top[i];
      codes[i] = uint8_t(int32_t(y + kRound - kRound));
    }
  } else if (kind == KvKind::sign) {
    for (int64_t i = 0; i < count; ++i) codes[i] = x[i] >= 0 && top[i] > 0;
  } else {  // trits: lo is the threshold
    for (int64_t i = 0; i < count; ++i) {
      const int trit = magnitude(x[i]) > lo[i] ? (x[i] > 0 ? 2 : 0) : 1;
      codes[i] = uint8_t(top[i] > 0 ? trit : 0);
    }
  }
}

// Of `count` elements that share parameters.
void code_group(KvKind kind, const float* x, int64_t count, float lo, float step, float top, uint8_t* codes) {
  constexpr int64_t kBlock = 16;
  float lows[kBlock], steps[kBlock], tops[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) lows[i] = lo, steps[i] = step, tops[i] = top;
  for (int64_t i = 0; i < count; i += kBlock)
    code_row(kind, x + i, count - i < kBlock ? count - i : kBlock, lows, steps, tops, codes + i);
}

struct RowCodes {
  alignas(64) uint8_t byte[kMostChannels + 64];
};

void seal_side(const KvFormat& fmt, const KvSide& side, const KvPage& page, KvHalf half, float gamma, Scratch& s) {
  const int64_t pitch = pitch_of(side.width);
  uint8_t* const codes = const_cast<uint8_t*>(half.codes);
  const int64_t high_bytes = side.row_bytes(true), low_bytes = side.low_bits ? side.row_bytes(false) : 0;
  uint8_t* arrays = const_cast<uint8_t*>(half.params);
  int64_t at = 0;  // of the part's bytes in a row
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part[i];
    const float* const x = s.rows + part.first;
    int64_t high_rank = 0, low_rank = 0;
    for (int64_t t = 0; t < fmt.page; ++t) {
      const bool high = page.is_high(t);
      if (!side.per_token && t % fmt.group == 0)
        channel_groups(fmt, side, part, x + t * pitch, pitch, fmt.group, gamma, t / fmt.group, half.param_rows, arrays,
                       s);
      const int64_t rank = high ? high_rank++ : page.n_high + low_rank++;
      RowCodes row;
      std::memset(row.byte + part.channels, 0, 64);
      const float* const xs = x + t * pitch;
      if (side.per_token) {
        token_groups(fmt, side, part, xs, high, gamma, rank, half.param_rows, arrays, s);
        for (int64_t g = 0, d = 0; d < part.channels; ++g, d += side.group)
          code_group(part.kind, xs + d, part.channels - d < side.group ? part.channels - d : side.group, s.lo[g],
                     s.step[g], s.top[g], row.byte + d);
      } else if (side.low_bits) {
        const float top = top_code(side, part, high);
        float *const step = s.line, *const tops = s.line + kMostChannels;
        for (int64_t d = 0; d < part.channels; ++d) step[d] = s.step[d] / top, tops[d] = step[d] > 0 ? top : 0.0f;
        code_row(part.kind, xs, part.channels, s.lo, step, tops, row.byte);
      } else {
        code_row(part.kind, xs, part.channels, s.lo, s.step, s.top, row.byte);
      }
      uint8_t* const to =
          codes + (high ? rank * high_bytes : page.n_high * high_bytes + (rank - page.n_high) * low_bytes) + at;
      pack_row(row.byte, high ? part.bits : side.low_bits, part.channels, to);
    }
    at += part.bytes();
    arrays += half.param_rows * part.arrays() * side.groups_of(part) * side.scale_bytes;
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

// ---- unpacking
// -------------------------------------------------------------------------------------------------------

// One row to fp32 in the order and the basis of the codes.
void dequantize_row(const KvFormat& fmt, const KvSide& side, const KvHalf& half, const uint8_t* codes, bool high,
                    int64_t rank, const float* scale, const float* zero, float* out) {
  RowCodes row;
  for (int i = 0; i < side.n_parts; ++i) {
    const KvPart& part = side.part[i];
    expand_row(codes, high ? part.bits : side.low_bits, part.channels, row.byte);
    codes += part.bytes();
    float* const to = out + part.first;
    if (!side.per_token) {
      for (int64_t d = 0; d < part.channels; ++d)
        to[d] = float(row.byte[d]) * scale[part.first + d] + zero[part.first + d];
      continue;
    }
    float scales[kMostChannels], zeros[kMostChannels];
    token_parameters(fmt, side, half, i, rank, scales, zeros);
    for (int64_t d = 0; d < part.channels; ++d)
      to[d] = float(row.byte[d]) * scales[d / side.group] + zeros[d / side.group];
  }
}

void write_row(const float* x, int64_t width, Dtype dtype, void* out, int64_t at) {
  switch (dtype) {
    case Dtype::f16:
      for (int64_t d = 0; d < width; ++d) narrow(x[d], static_cast<f16*>(out)[at + d]);
      return;
    case Dtype::bf16:
      for (int64_t d = 0; d < width; ++d) narrow(x[d], static_cast<bf16*>(out)[at + d]);
      return;
    default:
      std::memcpy(static_cast<float*>(out) + at, x, size_t(width) * sizeof(float));
  }
}

void unseal(const KvFormat& fmt, const KvPage& page, const uint8_t* data_end, const KvChannels channels[2], Dtype dtype,
            void* const out[2], int64_t stride, void* memory) {
  Scratch s(fmt, memory);
  for (int which = 0; which < 2; ++which) {
    const KvSide& side = which ? fmt.value : fmt.key;
    const KvHalf& half = which ? page.value : page.key;
    const int64_t width = side.width, high_bytes = side.row_bytes(true);
    const int64_t low_bytes = side.low_bits ? side.row_bytes(false) : 0;
    int64_t high_rank = 0, low_rank = 0, slot = 0;
    for (int64_t t = 0; t < page.n; ++t) {
      const bool high = page.is_high(t);
      const int64_t rank = high ? high_rank++ : page.n_high + low_rank++;
      if (!side.per_token) {
        const bool next = t == page.groups_end[slot];
        slot += next;
        if (t == 0 || next || side.low_bits) channel_parameters(fmt, side, half, slot, high, s.step, s.lo);
      }
      const int64_t bytes = high ? high_bytes : low_bytes;
      const uint8_t* codes =
          half.codes + (high ? rank * high_bytes : page.n_high * high_bytes + (rank - page.n_high) * low_bytes);
      uint8_t copy[kMostChannels + 2 * kSlack];
      if (data_end - codes < bytes + kSlack) codes = static_cast<uint8_t*>(std::memcpy(copy, codes, size_t(bytes)));
      float* const coded = s.line;
      dequantize_row(fmt, side, half, codes, high, rank, s.step, s.lo, coded);
      float* plain = s.line + kMostChannels;
      const KvChannels& of = channels[which];
      const int64_t easy = side.part[0].fourier ? side.part[0].channels : 0;
      for (int64_t i = 0; i < easy; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < easy; ++j) sum += of.basis[i * easy + j] * (coded[j] * fourier_weight(easy, j));
        plain[of.order ? of.order[i] : i] = sum;
      }
      for (int64_t d = easy; d < width; ++d) {
        const int64_t to = of.order ? of.order[d] : d;
        plain[to] = of.factor ? coded[d] * widen(of.factor[d]) : coded[d];
      }
      write_row(plain, width, dtype, out[which], t * stride);
    }
  }
}

}  // namespace

extern const QuantizeKernels quantize_kernels;
const QuantizeKernels quantize_kernels = {scratch_bytes, seal, unseal};

}  // namespace fastok::FASTOK_ISA
