#include "quantize/kv_format.h"

namespace fastok {
namespace {

bool side_of(const int64_t* ints, int64_t group, int64_t scale_bytes, int64_t low, int64_t width, KvSide& side) {
  const int64_t bits = ints[0], axis = ints[1], flags = ints[2];
  side = {axis == 1, (flags & 1) != 0, (flags & 2) != 0, int(low / 100), width, group, scale_bytes, 0, 1, {}};
  if (axis < 0 || axis > 1 || flags < 0 || flags > 3) return false;
  if (bits == 150 || bits == 125 || bits == 100) {
    side.hard = width * (bits - 100) / 100;
    const int64_t easy = width - side.hard;
    side.part[0] = {KvKind::sign, 1, 0, easy, easy >= 2 && (easy & (easy - 1)) == 0};
    side.part[1] = {KvKind::affine, 2, easy, side.hard, false};
    side.n_parts = side.hard > 0 ? 2 : 1;
    return low == 0 && !side.channel_scale;
  }
  if (bits != 158 && bits != 800 && bits != 400 && bits != 200) return false;
  const bool affine = bits != 158;
  side.part[0] = {affine ? KvKind::affine : KvKind::trit, affine ? int(bits / 100) : 0, 0, width, false};
  return affine ? low < bits : low == 0 && !side.channel_scale;
}

}  // namespace

bool KvFormat::of(const int64_t* ints, size_t count, int64_t width, KvFormat& out) {
  if (count != 10 || width % 8 != 0 || width < 32 || width > kMostChannels) return false;
  const int64_t group = ints[6], page = ints[7], scale = ints[8], low = ints[9];
  if (group < 8 || group > 256 || group % 8 != 0 || page < 8 || page > kMostPage || page % 8 != 0) return false;
  if (scale < 0 || scale > 2 || (low != 0 && low != 200 && low != 400)) return false;
  const int64_t scale_bytes = scale == 2 ? 4 : 2;
  if (!side_of(ints, group, scale_bytes, low, width, out.key)) return false;
  if (!side_of(ints + 3, group, scale_bytes, low, width, out.value)) return false;
  const bool along_channels = !out.key.per_token || !out.value.per_token;
  if (along_channels && (page % group != 0 || (low != 0 && page != group))) return false;
  out.group = group;
  out.page = page;
  out.token_groups = along_channels ? page / group : 1;
  out.scale = static_cast<KvScale>(scale);
  out.two_classes = low != 0;
  return true;
}

}  // namespace fastok
