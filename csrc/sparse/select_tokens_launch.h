// Which token selection kernels run, with what. `launch` starts kernels: launch(grid, block, shared bytes, kernel,
// arguments...) and launch.zero(pointer, bytes); the CUDA binding and the host harness each bring their own.
#pragma once
#include "sparse/select_tokens_kernel.cuh"

namespace fastok::cuda {

// p holds the problem and the results; `words` has room for select_words() and `candidates` for all tokens, unless
// selects_by_row().
template <class Launch>
void run_select_tokens(Launch&& launch, int64_t batch, int* words, uint64_t* candidates, SelectParams p) {
  const int64_t rows = batch * p.heads;
  p.aligned =
      (reinterpret_cast<uintptr_t>(p.scores) | uint64_t(p.batch_stride | p.head_stride) * sizeof(float)) % 16 == 0;
  const bool by_mass = p.mass > 0;
  if (selects_by_row(p.tokens, by_mass)) {
    const auto kernel = by_mass ? select_row_kernel<true> : select_row_kernel<false>;
    return launch(dim3(unsigned(rows)), dim3(kSelectThreads), select_bytes(by_mass), kernel, p);
  }
  p.tiles = int(select_tiles(p.tokens));
  p.digits = words, p.tickets = p.digits + rows * kDigits, p.states = p.tickets + rows * 2;
  p.taken = p.states + rows * kHeadState, p.begins = p.taken + rows * p.tiles, p.counts = p.begins + rows * p.tiles;
  p.candidates = candidates;
  const dim3 grid(unsigned(rows * p.tiles)), block(kSelectThreads);
  launch.zero(words, size_t(select_zeros(rows)) * sizeof(int));
  launch(grid, block, cut_bytes(), first_digit_kernel, p);
  launch(grid, block, collect_bytes(), collect_kernel, p);
  launch(grid, block, shared_bytes<int>(32), write_kernel, p);
}

}  // namespace fastok::cuda
