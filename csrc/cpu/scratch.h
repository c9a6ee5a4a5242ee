// Working memory of the CPU kernels, and how they share out work.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory>

#include "common/tensor.h"

namespace fastok {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<std::byte, Free>;

// On a cache line, freed with its owner; not initialised.
inline Scratch allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64);
  STD_TORCH_CHECK(p != nullptr, "out of memory: ", bytes, " bytes of scratch");
  return Scratch(static_cast<std::byte*>(p));
}

inline int64_t workers() { return torch::stable::get_num_threads(); }

// Calls body(worker, task) for every task, each when a thread is free. A worker is one thread's number, below
// workers().
template <class Body>
void share_out(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(tasks, workers()), 1, [&](int64_t begin, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(begin, task);
  });
}

}  // namespace fastok
