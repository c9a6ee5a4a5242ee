// Shapes of the kernels of attention's gradient: tiles and shared memory, by head dim and element type alone. Pure
// functions, for host and device. Torch-free.
#pragma once
#include "attention/attention_plan.h"

namespace fastok::cuda {

// What a kernel finds the gradient of. Those of keys and values come from one kernel where both fit in registers.
enum class GradientOf { queries, keys, values, keys_and_values };

// Head dims that there are kernels for; rows are padded with zeros.
inline constexpr int gradient_width(int64_t width) { return width <= 64 ? 64 : width <= 128 ? 128 : 256; }

// Rows that a block keeps, 16 per warp: queries or keys. The widest rows of fp32 leave half of the warps idle.
FASTOK_HOST_DEVICE constexpr int gradient_kept(int width, size_t element_size) {
  return element_size == 4 && width > 128 ? 32 : kAttentionWarps * 16;
}
// Rows that go by at once: keys or queries.
FASTOK_HOST_DEVICE constexpr int gradient_passing(int width, size_t element_size) {
  return width <= 64 ? (element_size == 4 ? 32 : 64) : width <= 128 && element_size == 2 ? 32 : 16;
}

// The kept rows of two arrays, and so many sets of passing rows of two arrays with two numbers each.
FASTOK_HOST_DEVICE constexpr size_t gradient_bytes(int width, size_t element_size, int stages) {
  const size_t pitch = size_t(tile_pitch(width, element_size)), passing = size_t(gradient_passing(width, element_size));
  return 2 * size_t(gradient_kept(width, element_size)) * pitch +
         size_t(stages) * 2 * (passing * pitch + shared_bytes<float>(passing));
}
// Two where they fit: one arrives while the other is worked on.
FASTOK_HOST_DEVICE constexpr int gradient_stages(int width, size_t element_size) {
  return gradient_bytes(width, element_size, 2) <= kMostSharedBytes ? 2 : 1;
}
FASTOK_HOST_DEVICE constexpr size_t gradient_bytes(int width, size_t element_size) {
  return gradient_bytes(width, element_size, gradient_stages(width, element_size));
}

static_assert(gradient_bytes(256, 2) <= kMostSharedBytes && gradient_bytes(256, 4) <= kMostSharedBytes &&
              gradient_bytes(128, 4) <= kMostSharedBytes);

}  // namespace fastok::cuda
