// How labels are stored. Torch-free.
#pragma once

namespace fastok {

enum class LabelCode { f32, f16, bf16, int8, int4 };

// Two 4-bit codes of a byte, as unsigned numbers 8 too large: channels c and c + ceil(r / 2).
struct int4_pair {
  unsigned char bits;
};

}  // namespace fastok
