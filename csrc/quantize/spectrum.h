// The cosines that spectra of channels are made of: the same bits on every backend. Torch-free.
#pragma once
#include <cmath>
#include <cstdint>

namespace fastok {

// cos(2 pi turn / n), by symmetry from the first eighth of a turn. The same for turn * m and n * m, m a power of two.
inline double cosine(int64_t turn, int64_t n) {
  constexpr double kTurn = 2 * 3.141592653589793;
  turn %= n;
  turn = turn < n - turn ? turn : n - turn;
  double sign = 1;
  if (4 * turn > n) turn = n / 2 - turn, sign = -1;
  const double angle = kTurn * double(turn) / double(n);
  return sign * (8 * turn <= n ? std::cos(angle) : std::sin(kTurn * (double(n) / 4 - double(turn)) / double(n)));
}

}  // namespace fastok
