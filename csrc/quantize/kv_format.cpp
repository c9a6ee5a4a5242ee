#include "quantize/kv_format.h"

namespace fastok {
namespace {

// Of `ints`: bits, axis, flags, bits of the low class, each number of bits times a hundred.
bool side_of(const int64_t* ints, int64_t group, int64_t scale_bytes, int64_t width, KvSide& side) {
  const int64_t bits = ints[0], axis = ints[1], flags = ints[2], low = ints[3];
  if (axis < 0 || axis > 1 || flags < 0 || flags > 3) return false;
  side = {axis == 1, (flags & 1) != 0, (flags & 2) != 0, low != 0, low == 158, width, group, scale_bytes, 0, 1, {}, {}};
  if (bits == 150 || bits == 125 || bits == 100) {
    side.hard = width * (bits - 100) / 100;
    const int64_t easy = width - side.hard;
    side.part[0] = {KvKind::sign, 1, 0, easy, easy >= 2 && (easy & (easy - 1)) == 0};
    side.part[1] = {KvKind::affine, 2, easy, side.hard, false};
    side.n_parts = side.hard > 0 ? 2 : 1;
    return low == 0 && !side.channel_scale;
  }
  const auto part_of = [&](int64_t of) {
    return KvPart{of == 158 ? KvKind::trit : KvKind::affine, of == 158 ? 0 : int(of / 100), 0, width, false};
  };
  if (bits != 158 && bits != 800 && bits != 400 && bits != 200) return false;
  side.part[0] = part_of(bits);
  side.low = part_of(low);
  if (bits == 158 && side.channel_scale) return false;
  if (side.own_arrays) return bits != 158 && !side.per_token;
  return low == 0 || ((low == 200 || low == 400) && bits != 158 && low < bits);
}

}  // namespace

bool KvFormat::of(const int64_t* ints, size_t count, int64_t width, KvFormat& out) {
  if (count != 11 || width % 8 != 0 || width < 32 || width > kMostChannels) return false;
  const int64_t group = ints[8], page = ints[9], scale = ints[10];
  if (group < 8 || group > 256 || group % 8 != 0 || page < 8 || page > kMostPage || page % 8 != 0) return false;
  if (scale < 0 || scale > 2) return false;
  const int64_t scale_bytes = scale == 2 ? 4 : 2;
  if (!side_of(ints, group, scale_bytes, width, out.key)) return false;
  if (!side_of(ints + 4, group, scale_bytes, width, out.value)) return false;
  const bool along_channels = !out.key.per_token || !out.value.per_token;
  out.two_classes = out.key.two_classes || out.value.two_classes;
  if (along_channels && (page % group != 0 || (out.two_classes && page != group))) return false;
  out.group = group;
  out.page = page;
  out.token_groups = along_channels ? page / group : 1;
  out.scale = static_cast<KvScale>(scale);
  return true;
}

}  // namespace fastok
