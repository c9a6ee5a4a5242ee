// Attention on the CPU, for the ops that have more to do with it.
#pragma once
#include <functional>
#include <tuple>

#include "attention/call_cpu.h"

namespace fastok {

// Rows [begin, end) of every head, which one task attends from the first to the last, and what that task does then:
// with the sequence and head, its packed keys, the log-sum-exp of all its rows, and a thread's scratch.
struct RowsTogether {
  int64_t begin, end;
  std::function<void(int64_t b, int64_t h, const AttentionHead&, const void* keys, const float* lse, void* scratch)>
      finished;
};

// Whether that leaves the threads enough to share out.
bool rows_fit_one_task(const AttentionCall&, int64_t begin, int64_t end);

// out and lse. `together` may be null.
std::tuple<Tensor, Tensor> attend(const AttentionCall&, const RowsTogether* together);

}  // namespace fastok
