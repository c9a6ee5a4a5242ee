// build_map, merge, merge_backward and unmerge on CUDA. Rows are moved 16 bytes at a time where everything is aligned;
// sums are kept in fp32 (fp64 for fp64) and run over a slot's members in ascending order, without atomics. Torch-free.
#pragma once
#include "merge/csr.cuh"
#include "ptx/st.h"

namespace fastok::cuda {

// A [B, rows, C] array; the last dimension is contiguous, strides are in elements.
struct TokenRows {
  void* data;
  int64_t batch_stride, row_stride;

  template <class T>
  __device__ T* row(int64_t b, int64_t i) const {
    return static_cast<T*>(data) + b * batch_stride + i * row_stride;
  }
};

struct Sizes {
  const float* data;  // nullptr: all 1
  int64_t batch_stride, stride;

  __device__ float at(int64_t b, int64_t i) const { return data ? data[b * batch_stride + i * stride] : 1.0f; }
};

struct MergeParams {
  MergeMode mode;
  int64_t batch;
  int n, n_out;
  int channels;
  int lanes;  // per row
  const int32_t *assign, *offsets, *members;
  TokenRows x, y, grad_y, grad_x, residual;  // residual.data may be null
  Sizes size;
  float* size_out;

  __device__ int begin(int64_t b, int slot) const { return offsets[b * (n_out + 1) + slot]; }
  __device__ int end(int64_t b, int slot) const { return offsets[b * (n_out + 1) + slot + 1]; }
  __device__ int member(int64_t b, int i) const { return members[b * n + i]; }
};

// Blocks per multiprocessor: enough threads to hide the way from map to row.
constexpr int kRowBlocks = 4;

// ---- rows -----------------------------------------------------------------------------------------------------------

// Calls body(sample, row, lane's first channel, step) for this thread's rows of [batch, rows]. Grid: x covers the rows,
// kRowThreads / lanes per block; y strides over the batch.
template <int kVector, class Body>
__device__ __forceinline__ void for_rows(const MergeParams& p, int rows, const Body& body) {
  const int row = int(blockIdx.x * unsigned(kRowThreads / p.lanes)) + int(threadIdx.x) / p.lanes;
  const int first = int(threadIdx.x) % p.lanes * kVector, step = p.lanes * kVector;
  if (row >= rows) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) body(b, row, first, step);
}

template <class T, int kVector>
__device__ __forceinline__ Pack<T, kVector> load(const T* p) {
  return *reinterpret_cast<const Pack<T, kVector>*>(p);
}
template <class T, int kVector>
__device__ __forceinline__ void store(T* p, const Pack<T, kVector>& values) {
  if constexpr (sizeof values == 16) {
    uint32_t words[4];
    memcpy(words, &values, sizeof words);
    ptx::st_global_16(p, words);
  } else {
    *reinterpret_cast<Pack<T, kVector>*>(p) = values;
  }
}

// A lane's part of a row, from `from` or zeros.
template <class T, int kVector>
__device__ __forceinline__ void copy_row(const T* from, T* to, int channels, int first, int step) {
#pragma unroll 4
  for (int channel = first; channel < channels; channel += step)
    store<T, kVector>(to + channel, from ? load<T, kVector>(from + channel) : Pack<T, kVector>{});
}

// ---- merge ----------------------------------------------------------------------------------------------------------

// Mean and sum: the members' rows, each times its share.
template <class T, int kVector>
__device__ void merge_weighted(const MergeParams& p, int64_t b, int begin, int end, Accumulator<T> total, int channel,
                               Pack<T, kVector>& out) {
  Accumulator<T> acc[kVector] = {};
#pragma unroll 1  // a slot has few members, and the division is long
  for (int j = begin; j < end; ++j) {
    const int token = p.member(b, j);
    const auto share = p.mode == MergeMode::mean ? Accumulator<T>(p.size.at(b, token)) / total : Accumulator<T>(1);
    const auto x = load<T, kVector>(p.x.row<T>(b, token) + channel);
#pragma unroll
    for (int e = 0; e < kVector; ++e) acc[e] += share * widen(x.at[e]);
  }
#pragma unroll
  for (int e = 0; e < kVector; ++e) narrow(acc[e], out.at[e]);
}

// Max, which keeps the values' own bits and lets NaN through.
template <class T, int kVector>
__device__ void merge_max(const MergeParams& p, int64_t b, int begin, int end, int channel, Pack<T, kVector>& out) {
  out = load<T, kVector>(p.x.row<T>(b, p.member(b, begin)) + channel);
  for (int j = begin + 1; j < end; ++j) {
    const auto x = load<T, kVector>(p.x.row<T>(b, p.member(b, j)) + channel);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const auto value = widen(x.at[e]);
      if (value > widen(out.at[e]) || isnan(value)) out.at[e] = x.at[e];
    }
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) merge_kernel(const MergeParams p) {
  for_rows<kVector>(p, p.n_out, [&](int64_t b, int slot, int first, int step) {
    const int begin = p.begin(b, slot), end = p.end(b, slot);
    Accumulator<T> total = 0;
    for (int j = begin; j < end; ++j) total += Accumulator<T>(p.size.at(b, p.member(b, j)));
    if (first == 0) p.size_out[b * p.n_out + slot] = float(total);

    // Most slots are empty or take over one row as it is.
    T* const to = p.y.row<T>(b, slot);
    const bool mean = p.mode == MergeMode::mean;
    if (begin == end || (mean && total == 0)) return copy_row<T, kVector>(nullptr, to, p.channels, first, step);
    if (p.mode == MergeMode::first || (end - begin == 1 && !(mean && !isfinite(total))))
      return copy_row<T, kVector>(p.x.row<T>(b, p.member(b, begin)), to, p.channels, first, step);

    for (int channel = first; channel < p.channels; channel += step) {
      Pack<T, kVector> out;
      if (p.mode == MergeMode::max) {
        merge_max<T, kVector>(p, b, begin, end, channel, out);
      } else {
        merge_weighted<T, kVector>(p, b, begin, end, total, channel, out);
      }
      store<T, kVector>(to + channel, out);
    }
  });
}

// ---- gradient -------------------------------------------------------------------------------------------------------

// What a token's gradient is of its slot's: 0 for dropped tokens.
template <class T>
__device__ Accumulator<T> gradient_share(const MergeParams& p, int64_t b, int token, int slot) {
  if (slot < 0) return 0;
  if (p.mode == MergeMode::first) return p.member(b, p.begin(b, slot)) == token ? 1 : 0;
  if (p.mode == MergeMode::sum) return 1;
  const auto total = Accumulator<T>(p.size_out[b * p.n_out + slot]);
  return total == 0 ? Accumulator<T>(0) : Accumulator<T>(p.size.at(b, token)) / total;
}

// Mean, sum and first: one row per token.
template <class T, int kVector>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) merge_backward_kernel(const MergeParams p) {
  for_rows<kVector>(p, p.n, [&](int64_t b, int token, int first, int step) {
    const int slot = p.assign[b * p.n + token];
    const Accumulator<T> share = gradient_share<T>(p, b, token, slot);
    const bool dropped = slot < 0 || (p.mode == MergeMode::first && share == 0);
    for (int channel = first; channel < p.channels; channel += step) {
      Pack<T, kVector> out{};
      if (!dropped) {
        out = load<T, kVector>(p.grad_y.row<T>(b, slot) + channel);
#pragma unroll
        for (int e = 0; e < kVector; ++e) narrow(widen(out.at[e]) * share, out.at[e]);
      }
      store<T, kVector>(p.grad_x.row<T>(b, token) + channel, out);
    }
  });
}

// Max: one row per slot, whose members are asked in ascending order, then one row per token for the dropped ones.
template <class T, int kVector>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) merge_max_backward_kernel(const MergeParams p) {
  for_rows<kVector>(p, p.n_out + p.n, [&](int64_t b, int row, int first, int step) {
    const int token = row - p.n_out;
    if (token >= 0) {
      if (p.assign[b * p.n + token] < 0)
        copy_row<T, kVector>(nullptr, p.grad_x.row<T>(b, token), p.channels, first, step);
      return;
    }
    const int begin = p.begin(b, row), end = p.end(b, row);
    for (int channel = first; channel < p.channels && begin < end; channel += step) {
      const auto top = load<T, kVector>(p.y.row<T>(b, row) + channel);
      const auto grad = load<T, kVector>(p.grad_y.row<T>(b, row) + channel);
      unsigned taken = 0;  // channels whose gradient has gone to an earlier member
      for (int j = begin; j < end; ++j) {
        const int64_t member = p.member(b, j);
        const auto x = load<T, kVector>(p.x.row<T>(b, member) + channel);
        Pack<T, kVector> out{};
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
          const auto value = widen(x.at[e]), best = widen(top.at[e]);
          const bool holds = value == best || (isnan(value) && isnan(best));
          if (holds && !(taken >> e & 1)) out.at[e] = grad.at[e], taken |= 1u << e;
        }
        store<T, kVector>(p.grad_x.row<T>(b, member) + channel, out);
      }
    }
  });
}

// ---- unmerge --------------------------------------------------------------------------------------------------------

template <class T, int kVector>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks) unmerge_kernel(const MergeParams p) {
  for_rows<kVector>(p, p.n, [&](int64_t b, int token, int first, int step) {
    const int slot = p.assign[b * p.n + token];
    const T* const from = slot < 0 ? nullptr : p.y.row<T>(b, slot);
    T* const to = p.x.row<T>(b, token);
    if (!p.residual.data) return copy_row<T, kVector>(from, to, p.channels, first, step);
    const T* const residual = p.residual.row<T>(b, token);
    for (int channel = first; channel < p.channels; channel += step) {
      Pack<T, kVector> out{};
      if (from) out = load<T, kVector>(from + channel);
      const auto more = load<T, kVector>(residual + channel);
#pragma unroll
      for (int e = 0; e < kVector; ++e) narrow(widen(out.at[e]) + widen(more.at[e]), out.at[e]);
      store<T, kVector>(to + channel, out);
    }
  });
}

// ---- maps -----------------------------------------------------------------------------------------------------------

// Grid: one block per sample.
__global__ void __launch_bounds__(1024)
    build_map_kernel(const int32_t* assign, int n, int n_out, const CsrPlan plan, int32_t* offsets, int32_t* members) {
  FASTOK_SHARED(shared);
  SharedMemory memory(shared);
  int* const scratch = memory.take<int>(32, "scratch");
  const int64_t b = blockIdx.x;
  build_csr(assign + b * n, n, n_out, plan, memory, scratch, offsets + b * (n_out + 1), members + b * n);
}

}  // namespace fastok::cuda
