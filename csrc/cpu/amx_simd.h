// The tile registers of AMX, all eight of 16 rows of 64 bytes. See cpu/dispatch.h for the rule about linkage.
#pragma once
#include "cpu/simd.h"

#if defined(__AMX_BF16__)
#define FASTOK_AMX 1

namespace fastok::FASTOK_ISA {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// From a constant: the compiler takes only the first bytes of what _tile_loadconfig is given for read, and may not have
// written the others of a variable by then.
inline void configure_tiles() {
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
}

// The tile registers, for as long as it lives.
struct Tiles {
  Tiles() { configure_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() { _tile_release(); }
  // Work that fills pauses: after some 400 ns without any, tiles take 250 ns to wake up. Changes tile 0.
  static void stay_awake() { _tile_dpbf16ps(0, 1, 2); }
};

}  // namespace
}  // namespace fastok::FASTOK_ISA

#endif
