// Shapes of the kernels that pack and unpack pages. Pure functions, for host and device. Torch-free.
#pragma once
#include "common/plan.h"
#include "quantize/kv_format.h"

namespace fastok::cuda {

constexpr int kQuantizeThreads = 128;
// Tokens that are worked on at a time where groups are along tokens, or a page is unpacked; padded by one channel.
constexpr int kTokenTile = 32;
constexpr int kSlab = kTokenTile * (int(kMostChannels) + 1);

// Along channels: neighbouring channels of a whole token group.
FASTOK_HOST_DEVICE constexpr int slab_channels(int group) {
  const int channels = kSlab / group;
  return channels < kQuantizeThreads ? channels : kQuantizeThreads;
}

// Bytes of shared memory of the kernel that packs.
inline size_t seal_bytes(const KvFormat& fmt) {
  size_t rows = kTokenTile;
  for (const KvSide* side : {&fmt.key, &fmt.value})
    if (!side->per_token && size_t(fmt.group) > rows) rows = size_t(fmt.group);
  const size_t groups = kTokenTile * size_t(kMostTokenGroups);
  return shared_bytes<float>(kSlab) + shared_bytes<uint8_t>(rows * size_t(fmt.key.width)) +
         shared_bytes<float>(kMostChannels) + shared_bytes<int16_t>(kMostChannels) + 3 * shared_bytes<float>(groups) +
         shared_bytes<int16_t>(kMostPage);
}
inline size_t unseal_bytes() {
  return shared_bytes<float>(kSlab) + shared_bytes<float>(kMostChannels) + shared_bytes<int16_t>(kMostChannels) +
         3 * shared_bytes<int>(kTokenTile);
}

}  // namespace fastok::cuda
