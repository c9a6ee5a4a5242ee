// Which matching kernels run, with what. `launch` starts kernels: launch(grid, block, shared bytes, kernel,
// arguments...) and launch.zero(pointer, bytes); the CUDA binding and the host harness each bring their own.
#pragma once
#include "match/match_kernel.cuh"
#include "match/nearest_kernel.cuh"

namespace fastok::cuda {

// Fills in the plan and runs; p holds the problem and the results. One launch up to kFusedTokens tokens (after clearing
// the tickets, if samples take several blocks), else three.
template <class Launch>
void run_match(Launch&& launch, Dtype dtype, int64_t batch, bool aligned, MatchParams p) {
  const MatchPlan plan =
      plan_match(p.n, p.shape.width, p.src.count, p.dst.count, p.n_out, element_size(dtype), aligned);
  p.row_tiles = int(plan.row_tiles);
  p.sort_width = plan.sort_width;
  p.order_words = plan.order_words;
  p.fused = plan.fused;
  p.shape = plan.shape;
  p.csr = plan.csr;
  if (plan.fused && plan.row_tiles > 1) launch.zero(p.counts, size_t(batch) * sizeof(int32_t));

  const bool wide = plan.warps == 8;
  void (*match)(MatchParams) = nullptr;
  switch (dtype) {
    case Dtype::f16:
      match = wide ? match_kernel<f16, 8> : match_kernel<f16, 4>;
      break;
    case Dtype::bf16:
      match = wide ? match_kernel<bf16, 8> : match_kernel<bf16, 4>;
      break;
    default:
      match = match_kernel<float, 4>;
  }
  launch(dim3(unsigned(batch * plan.row_tiles)), dim3(unsigned(plan.warps * kWarpSize)), plan.match_bytes, match, p);
  if (plan.fused) return;
  launch(dim3(unsigned(batch * plan.rank_blocks)), dim3(kRankThreads), 2 * shared_bytes<int>(kRankTile), rank_kernel, p,
         int(plan.rank_blocks));
  launch(dim3(unsigned(batch)), dim3(kSlotThreads), plan.slot_bytes, slot_kernel, p);
}

template <class Launch>
void run_identity(Launch&& launch, int64_t batch, int64_t n, int32_t* assign, int32_t* counts, int32_t* offsets,
                  int32_t* members) {
  constexpr int kThreads = 256;
  launch(dim3(unsigned((batch * (n + 1) + kThreads - 1) / kThreads)), dim3(kThreads), size_t(0), identity_kernel, batch,
         int(n), assign, counts, offsets, members);
}

// Fills in the plan and runs, in one launch.
template <class Launch>
void run_nearest(Launch&& launch, Dtype dtype, int64_t batch, bool aligned, NearestParams p) {
  void (*kernel)(NearestParams) = nullptr;
  if (nearest_on_tiles(p.k, p.similarity, dtype == Dtype::f32)) {
    const int warps = plan_warps(p.n, element_size(dtype));
    p.row_tiles = (p.n + warps * 16 - 1) / (warps * 16);
    p.shape = plan_sweep(p.width, element_size(dtype), warps, p.similarity == Similarity::cosine, aligned);
    switch (dtype) {
      case Dtype::f16:
        kernel = warps == 8 ? nearest_tile_kernel<f16, 8> : nearest_tile_kernel<f16, 4>;
        break;
      case Dtype::bf16:
        kernel = warps == 8 ? nearest_tile_kernel<bf16, 8> : nearest_tile_kernel<bf16, 4>;
        break;
      default:
        kernel = nearest_tile_kernel<float, 4>;
    }
    launch(dim3(unsigned(batch * p.row_tiles)), dim3(unsigned(warps * kWarpSize)), sweep_bytes(p.shape, warps), kernel,
           p);
    return;
  }
  p.row_tiles = (p.n + kListRows - 1) / kListRows;
  switch (dtype) {
    case Dtype::f16:
      kernel = nearest_list_kernel<f16>;
      break;
    case Dtype::bf16:
      kernel = nearest_list_kernel<bf16>;
      break;
    default:
      kernel = nearest_list_kernel<float>;
  }
  launch(dim3(unsigned(batch * p.row_tiles)), dim3(kListThreads), list_bytes(), kernel, p);
}

}  // namespace fastok::cuda
