// A packed KV format and where everything is in one of its pages (docs/kv-format.md). The twin of
// python/fastok/reference/kv_layout.py. Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>

#include "attention/attention.h"
#include "common/plan.h"

namespace fastok {

enum class KvKind { affine, trit, sign };
enum class KvScale { f16, bf16, f32 };

inline constexpr int64_t kMostChannels = 256, kMostPage = 256, kMostTokenGroups = 32;

FASTOK_HOST_DEVICE FASTOK_INLINE int64_t kv_aligned(int64_t size) { return (size + 15) / 16 * 16; }
FASTOK_HOST_DEVICE FASTOK_INLINE int64_t kv_code_bytes(int bits, int64_t channels) {  // bits 0: trits
  return bits == 0 ? (channels + 4) / 5 : (channels * bits + 7) / 8;
}

// One step towards -inf (direction < 0) or inf, on sign-and-magnitude bits.
template <class Bits>
FASTOK_HOST_DEVICE FASTOK_INLINE Bits next_bits(Bits bits, int direction) {
  constexpr Bits kSign = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
  const bool negative = bits & kSign;
  if ((bits & Bits(~kSign)) == 0) return direction < 0 ? Bits(kSign | 1) : Bits(1);
  return negative == (direction < 0) ? Bits(bits + 1) : Bits(bits - 1);
}

// Some channels of a row that share a code.
struct KvPart {
  KvKind kind;
  int bits;  // 8, 4, 2, 1, or 0 for trits
  int64_t first, channels;
  bool fourier;

  FASTOK_HOST_DEVICE FASTOK_INLINE int arrays() const { return kind == KvKind::affine ? 2 : 1; }
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t bytes() const { return kv_code_bytes(bits, channels); }
};

// The keys' or the values' half.
struct KvSide {
  bool per_token, channel_scale, compat;
  bool two_classes, own_arrays;  // own_arrays: the low class has parameters of its own, and not the high one's
  int64_t width, group, scale_bytes, hard;
  int n_parts;
  KvPart part[2], low;  // low: what the low class has instead of part[0]

  FASTOK_HOST_DEVICE FASTOK_INLINE bool needs_channels() const { return channel_scale || hard > 0; }
  // Whether classes share the ranges of channels, which are stored in place of scales.
  FASTOK_HOST_DEVICE FASTOK_INLINE bool shares_ranges() const { return two_classes && !own_arrays && !per_token; }
  FASTOK_HOST_DEVICE FASTOK_INLINE const KvPart& part_of(int i, bool high) const {
    return high || !two_classes ? part[i] : low;
  }
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t row_bytes(bool high) const {
    if (!high && two_classes) return low.bytes();
    return part[0].bytes() + (n_parts > 1 ? part[1].bytes() : 0);
  }
  // Entries of one row of a parameter array.
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t groups_of(const KvPart& p) const {
    return per_token ? int(p.channels + group - 1) / int(group) : p.channels;  // GPUs divide 32 bits
  }
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t arrays_width() const {
    int64_t width_sum = 0;
    for (int i = 0; i < n_parts; ++i) width_sum += part[i].arrays() * groups_of(part[i]);
    return width_sum;
  }
  // Of a page with so many tokens of each class, and token groups that have any.
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t codes_size(int64_t high, int64_t low_tokens) const {
    return kv_aligned(high * row_bytes(true) + low_tokens * row_bytes(false));
  }
  // Rows of the parameter arrays, of those of the high class where the low one has its own.
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t array_rows(int64_t high, int64_t low_tokens, int64_t token_groups) const {
    return per_token ? high + low_tokens : own_arrays ? high > 0 : token_groups;
  }
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t array_bytes(int64_t rows) const {
    return rows * arrays_width() * scale_bytes;
  }
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t params_size(int64_t high, int64_t low_tokens, int64_t token_groups) const {
    const int64_t of_low = own_arrays && low_tokens > 0 ? low.arrays() * groups_of(low) * scale_bytes : 0;
    return array_bytes(array_rows(high, low_tokens, token_groups)) + of_low;
  }
  FASTOK_HOST_DEVICE FASTOK_INLINE int64_t size(int64_t high, int64_t low_tokens, int64_t token_groups) const {
    return codes_size(high, low_tokens) + kv_aligned(params_size(high, low_tokens, token_groups));
  }
};

struct KvFormat {
  KvSide key, value;
  int64_t group, page, token_groups;
  KvScale scale;
  bool two_classes;

  // From the ints that the ops take; false if they mean nothing or heads of `width` channels cannot be stored so.
  static bool of(const int64_t* ints, size_t count, int64_t width, KvFormat& out);
};

// One side of one page.
struct KvHalf {
  const uint8_t *codes, *params;
  int64_t param_rows;
  const uint8_t* low_params;  // where the low class has arrays of its own

  FASTOK_INLINE static KvHalf of(const KvSide& side, const uint8_t* codes, int64_t high, int64_t low,
                                 int64_t token_groups) {
    const uint8_t* const params = codes + side.codes_size(high, low);
    const int64_t rows = side.array_rows(high, low, token_groups);
    return {codes, params, rows, params + side.array_bytes(rows)};
  }
  FASTOK_INLINE KvHalf moved(int64_t by) const { return {codes + by, params + by, param_rows, low_params + by}; }
};

// One page of one head: how many entries it has, and where they are.
struct KvPage {
  int64_t n, n_high, filled;             // filled: token groups that have entries
  int64_t groups_end[kMostTokenGroups];  // of the filled ones, one behind the last entry
  const uint8_t* classes;                // bits, nullptr: one class
  KvHalf key, value;
  int64_t size;

  FASTOK_INLINE static KvPage of(const KvFormat& fmt, const uint8_t* record, const int16_t* counts,
                                 const uint8_t* classes) {
    KvPage page{};
    page.classes = classes;
    for (int64_t i = 0; i < fmt.token_groups; ++i) {
      if (counts[i] <= 0) continue;
      page.n += counts[i];
      page.groups_end[page.filled++] = page.n;
    }
    page.n_high = page.n;
    if (classes) {
      page.n_high = 0;
      for (int64_t i = 0; i < page.n; i += 8) page.n_high += __builtin_popcount(page.high_bits(i));
    }
    const int64_t low = page.n - page.n_high;
    page.key = KvHalf::of(fmt.key, record, page.n_high, low, page.filled);
    const uint8_t* const half = record + fmt.key.size(page.n_high, low, page.filled);
    page.value = KvHalf::of(fmt.value, half, page.n_high, low, page.filled);
    page.size = page.n > 0 ? half + fmt.value.size(page.n_high, low, page.filled) - record : 0;
    return page;
  }
  // A page like this one, so many bytes behind it.
  FASTOK_INLINE KvPage moved(int64_t by) const {
    KvPage page = *this;
    page.key = key.moved(by);
    page.value = value.moved(by);
    return page;
  }
  FASTOK_INLINE bool is_high(int64_t entry) const { return !classes || (classes[entry / 8] >> (entry % 8) & 1); }
  // Of the 8 entries from `entry` on, which is a multiple of 8, a bit for each that is there and high.
  FASTOK_INLINE unsigned high_bits(int64_t entry) const {
    const unsigned there = n - entry < 8 ? (1u << (n - entry)) - 1 : 0xffu;
    return (classes ? classes[entry / 8] : 0xffu) & there;
  }
};

}  // namespace fastok
