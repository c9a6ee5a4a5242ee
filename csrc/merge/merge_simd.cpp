// One streaming pass per op: fp32 sums in ascending source order, 16-bit types widened and rounded in registers.
#include "cpu/simd.h"
#include "merge/merge.h"

namespace fastok::FASTOK_ISA {
namespace {

// The accumulator of a storage type and how many of them one vector holds.
template <class T>
struct Lane {
  using Acc = float;
  using Vec = vf;
  static constexpr int width = kLanes;
};
template <>
struct Lane<double> {
  using Acc = double;
  using Vec = double;
  static constexpr int width = 1;
};
template <class T>
typename Lane<T>::Vec spread(float x) {
  if constexpr (Lane<T>::width == 1) {
    return x;
  } else {
    return splat(x);
  }
}
template <class T>
T* row(const Tokens& t, int64_t b, int64_t i) {
  return static_cast<T*>(t.data) + b * t.batch_stride + i * t.row_stride;
}

// An array of no bytes may be null, which the standard functions do not take.
template <class T>
void copy_row(T* out, const T* source, int64_t channels) {
  if (channels > 0) std::memcpy(out, source, size_t(channels) * sizeof(T));
}
template <class T>
void clear_row(T* out, int64_t channels) {
  if (channels > 0) std::memset(out, 0, size_t(channels) * sizeof(T));
}

// How much of the mean a member makes up; 1 in the other modes.
template <MergeMode kMode>
inline float share_of(const float* size, int32_t member, float total) {
  return kMode == MergeMode::mean ? (size ? size[member] : 1.0f) / total : 1.0f;
}

// One member more: `acc` is what those before it (none if `first`) came to.
template <MergeMode kMode, class V>
inline __attribute__((always_inline)) V joined(V acc, V value, V share, bool first) {
  if constexpr (kMode == MergeMode::max) {
    return first ? value : select(either(greater(value, acc), unordered(value)), value, acc);
  } else if constexpr (kMode == MergeMode::sum) {
    return acc + value;
  } else {
    return fma(value, share, acc);
  }
}

// Columns [begin, channels) one by one: what is left of a row beside whole vectors.
template <class T, MergeMode kMode>
void reduce_rest(const Tokens& x, int64_t b, const int32_t* members, int64_t count, const float* size, float total,
                 T* y, int64_t begin, int64_t channels) {
  using Acc = typename Lane<T>::Acc;
  for (int64_t c = begin; c < channels; ++c) {
    Acc acc = 0;
    for (int64_t j = 0; j < count; ++j) {
      const Acc value = widen(row<T>(x, b, members[j])[c]);
      if constexpr (kMode == MergeMode::max) {
        acc = j == 0 || value > acc || value != value ? value : acc;
      } else if constexpr (kMode == MergeMode::sum) {
        acc += value;
      } else {
        acc += value * Acc(share_of<kMode>(size, members[j], total));
      }
    }
    narrow(acc, y[c]);
  }
}

// A slot of kCount members. Most slots have few, in no order that a processor foresees: a loop over members within one
// over columns would end by a mispredicted branch at every turn.
template <class T, MergeMode kMode, int kCount>
void reduce_few(const Tokens& x, int64_t b, const int32_t* members, const float* size, float total, T* y,
                int64_t channels) {
  constexpr int width = Lane<T>::width;
  const T* source[kCount];
  typename Lane<T>::Vec share[kCount];
#pragma GCC unroll 4
  for (int j = 0; j < kCount; ++j) {
    source[j] = row<T>(x, b, members[j]);
    share[j] = spread<T>(share_of<kMode>(size, members[j], total));
  }
  int64_t c = 0;
  for (; c + 2 * width <= channels; c += 2 * width) {
    typename Lane<T>::Vec first = {}, second = {}, low, high;
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      load_pair(source[j] + c, low, high);
      first = joined<kMode>(first, low, share[j], j == 0);
      second = joined<kMode>(second, high, share[j], j == 0);
    }
    store_pair(y + c, first, second);
  }
  if (c + width <= channels) {
    typename Lane<T>::Vec acc = {};
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) acc = joined<kMode>(acc, load(source[j] + c), share[j], j == 0);
    store(y + c, acc);
    c += width;
  }
  reduce_rest<T, kMode>(x, b, members, kCount, size, total, y, c, channels);
}

// Columns [c, c + kVectors * width) of a slot of many members.
template <class T, MergeMode kMode, int kVectors>
inline __attribute__((always_inline)) void reduce_vectors(const Tokens& x, int64_t b, const int32_t* members,
                                                          int64_t count, const float* size, float total, T* y,
                                                          int64_t c) {
  constexpr int width = Lane<T>::width;
  typename Lane<T>::Vec acc[kVectors] = {};
  for (int64_t j = 0; j < count; ++j) {
    const T* source = row<T>(x, b, members[j]) + c;
    const auto share = spread<T>(share_of<kMode>(size, members[j], total));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) acc[v] = joined<kMode>(acc[v], load(source + v * width), share, j == 0);
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) store(y + c + v * width, acc[v]);
}

template <class T, MergeMode kMode>
void reduce(const Tokens& x, int64_t b, const int32_t* members, int64_t count, const float* size, float total, T* y,
            int64_t channels) {
  constexpr int width = Lane<T>::width;
  switch (count) {
    case 2:
      return reduce_few<T, kMode, 2>(x, b, members, size, total, y, channels);
    case 3:
      return reduce_few<T, kMode, 3>(x, b, members, size, total, y, channels);
    case 4:
      return reduce_few<T, kMode, 4>(x, b, members, size, total, y, channels);
  }
  int64_t c = 0;
  for (; c + 8 * width <= channels; c += 8 * width)
    reduce_vectors<T, kMode, 8>(x, b, members, count, size, total, y, c);
  for (; c + width <= channels; c += width) reduce_vectors<T, kMode, 1>(x, b, members, count, size, total, y, c);
  reduce_rest<T, kMode>(x, b, members, count, size, total, y, c, channels);
}

// Asks for a row that will soon be read: rows in no order are more than the hardware's own prefetcher foresees.
template <class T>
void prefetch_row(const Tokens& x, int64_t b, int32_t token, int64_t channels) {
  constexpr int64_t kLine = 64, kMostBytes = 64 * kLine;
  const int64_t row_bytes = channels * int64_t(sizeof(T)), bytes = row_bytes < kMostBytes ? row_bytes : kMostBytes;
  const char* begin = reinterpret_cast<const char*>(row<T>(x, b, token));
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(begin + at);
}

// How many rows further is fetched.
int64_t rows_ahead(int64_t row_bytes) {
  constexpr int64_t kBytesAhead = 8 << 10, kFewest = 2, kMost = 16;
  const int64_t rows = row_bytes > 0 ? kBytesAhead / row_bytes : kFewest;
  return rows < kFewest ? kFewest : rows < kMost ? rows : kMost;
}

template <class T>
void merge_rows(MergeMode mode, const TokenMapView& map, Tokens x, const float* size, Tokens y, float* size_out,
                int64_t channels, bool past_caches, int64_t begin, int64_t end) {
  const int64_t far = rows_ahead(channels * int64_t(sizeof(T)));
  int64_t b = begin / map.n_out, slot = begin % map.n_out;
  for (int64_t i = begin; i < end; ++i, ++slot) {
    if (slot == map.n_out) ++b, slot = 0;
    const int32_t* offsets = map.offsets + b * (map.n_out + 1) + slot;
    const int32_t* members = map.members + b * map.n + offsets[0];
    const int64_t count = offsets[1] - offsets[0], left = map.offsets[(b + 1) * (map.n_out + 1) - 1] - offsets[0];
    const float* sizes = size ? size + b * map.n : nullptr;
    float total = 0;
    for (int64_t j = 0; j < count; ++j) total += sizes ? sizes[members[j]] : 1.0f;
    size_out[i] = total;
    T* out = row<T>(y, b, slot);
    for (int64_t j = far; j < far + count && j < left; ++j) prefetch_row<T>(x, b, members[j], channels);
    if (count == 0 || (mode == MergeMode::mean && total == 0)) {
      clear_row(out, channels);
    } else if (count == 1 || mode == MergeMode::first) {
      if (past_caches) {
        stream_lines(out, row<T>(x, b, members[0]), channels * int64_t(sizeof(T)));
      } else {
        copy_row(out, row<T>(x, b, members[0]), channels);
      }
    } else if (mode == MergeMode::mean) {
      reduce<T, MergeMode::mean>(x, b, members, count, sizes, total, out, channels);
    } else if (mode == MergeMode::sum) {
      reduce<T, MergeMode::sum>(x, b, members, count, sizes, total, out, channels);
    } else {
      reduce<T, MergeMode::max>(x, b, members, count, sizes, total, out, channels);
    }
  }
  if (past_caches) finish_streaming();
}

template <class T>
void scaled_copy(const T* source, float factor, T* out, int64_t channels) {
  using Acc = typename Lane<T>::Acc;
  constexpr int width = Lane<T>::width;
  int64_t c = 0;
  for (; c + width <= channels; c += width) store(out + c, load(source + c) * spread<T>(factor));
  for (; c < channels; ++c) narrow(Acc(widen(source[c]) * Acc(factor)), out[c]);
}

template <class T>
void backward_rows(MergeMode mode, const TokenMapView& map, Tokens grad_y, const float* size, const float* size_out,
                   Tokens grad_x, int64_t channels, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / map.n, token = i % map.n;
    const int32_t slot = map.assign[i];
    T* out = row<T>(grad_x, b, token);
    float factor = 0;
    if (slot >= 0) {
      const float total = size_out[b * map.n_out + slot];
      const int32_t first = map.members[b * map.n + map.offsets[b * (map.n_out + 1) + slot]];
      if (mode == MergeMode::mean) {
        factor = total == 0 ? 0 : (size ? size[i] : 1.0f) / total;
      } else {
        factor = mode == MergeMode::first && first != token ? 0.0f : 1.0f;
      }
    }
    if (factor == 0) {
      clear_row(out, channels);
    } else if (factor == 1) {
      copy_row(out, row<T>(grad_y, b, slot), channels);
    } else {
      scaled_copy(row<T>(grad_y, b, slot), factor, out, channels);
    }
  }
}

template <class T>
void max_backward_rows(const TokenMapView& map, Tokens grad_y, Tokens x, Tokens y, Tokens grad_x, int64_t channels,
                       int64_t begin, int64_t end) {
  const auto holds = [](T value, T top) {
    const auto v = widen(value), t = widen(top);
    return v == t || (v != v && t != t);
  };
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / map.n_out, slot = i % map.n_out;
    const int32_t* offsets = map.offsets + b * (map.n_out + 1) + slot;
    const int32_t* members = map.members + b * map.n;
    for (int64_t j = offsets[0]; j < offsets[1]; ++j) {
      T* out = row<T>(grad_x, b, members[j]);
      for (int64_t c = 0; c < channels; ++c) {
        const T top = row<T>(y, b, slot)[c];
        bool wins = holds(row<T>(x, b, members[j])[c], top);
        for (int64_t earlier = offsets[0]; wins && earlier < j; ++earlier)
          wins = !holds(row<T>(x, b, members[earlier])[c], top);
        out[c] = wins ? row<T>(grad_y, b, slot)[c] : T{};
      }
    }
  }
}

template <class T>
void unmerge_rows(const TokenMapView& map, Tokens y, Tokens residual, Tokens out, int64_t channels, int64_t begin,
                  int64_t end) {
  using Acc = typename Lane<T>::Acc;
  constexpr int width = Lane<T>::width;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / map.n, token = i % map.n;
    const int32_t slot = map.assign[i];
    T* target = row<T>(out, b, token);
    const T* added = residual.data ? row<T>(residual, b, token) : nullptr;
    if (slot < 0) {
      if (added) {
        copy_row(target, added, channels);
      } else {
        clear_row(target, channels);
      }
      continue;
    }
    const T* source = row<T>(y, b, slot);
    if (!added) {
      copy_row(target, source, channels);
      continue;
    }
    int64_t c = 0;
    for (; c + width <= channels; c += width) store(target + c, load(source + c) + load(added + c));
    for (; c < channels; ++c) narrow(Acc(widen(source[c]) + widen(added[c])), target[c]);
  }
}

template <class Body>
void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::f64:
      return body(double{});
    case Dtype::f32:
      return body(float{});
    case Dtype::f16:
      return body(f16{});
    case Dtype::bf16:
      return body(bf16{});
  }
}

void merge(Dtype dtype, MergeMode mode, const TokenMapView& map, Tokens x, const float* size, Tokens y, float* size_out,
           int64_t channels, bool past_caches, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto t) {
    merge_rows<decltype(t)>(mode, map, x, size, y, size_out, channels, past_caches, begin, end);
  });
}
void backward(Dtype dtype, MergeMode mode, const TokenMapView& map, Tokens grad_y, const float* size,
              const float* size_out, Tokens grad_x, int64_t channels, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto t) {
    backward_rows<decltype(t)>(mode, map, grad_y, size, size_out, grad_x, channels, begin, end);
  });
}
void max_backward(Dtype dtype, const TokenMapView& map, Tokens grad_y, Tokens x, Tokens y, Tokens grad_x,
                  int64_t channels, int64_t begin, int64_t end) {
  with_type(dtype, [&](auto t) { max_backward_rows<decltype(t)>(map, grad_y, x, y, grad_x, channels, begin, end); });
}
void unmerge(Dtype dtype, const TokenMapView& map, Tokens y, Tokens residual, Tokens out, int64_t channels,
             int64_t begin, int64_t end) {
  with_type(dtype, [&](auto t) { unmerge_rows<decltype(t)>(map, y, residual, out, channels, begin, end); });
}

}  // namespace

extern const MergeKernels merge_kernels;
const MergeKernels merge_kernels = {merge, backward, max_backward, unmerge};

}  // namespace fastok::FASTOK_ISA
