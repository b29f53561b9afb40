#include "kvx/copy.h"

#include <cstring>

#include "kvx/checksum.h"

namespace kvx {

namespace {

// From here on a block is written past the caches. Measured: see docs/decisions on the checksum.
constexpr int64_t kStreamingBytes = 4 << 10;

Stores stores_for(int64_t block_bytes) {
  return block_bytes >= kStreamingBytes ? Stores::kStreaming : Stores::kCached;
}

}  // namespace

PlaneSet::PlaneSet(std::span<const Plane> planes, bool merges) {
  for (const Plane& plane : planes) {
    block_bytes_ += plane.bytes;
    if (merges && !planes_.empty()) {
      Plane& last = planes_.back();
      if (last.base + last.bytes == plane.base && last.stride == plane.stride) {
        last.bytes += plane.bytes;
        continue;
      }
    }
    planes_.push_back(plane);
  }
}

uint64_t gather_block(const PlaneSet& source, int64_t block, uint8_t* target, uint64_t seed) {
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  const Stores stores = stores_for(source.block_bytes());
  uint64_t state = seed;
  for (const Plane& plane : source.planes()) {
    state = kernel.copy(state, target, plane.base + block * plane.stride,
                        static_cast<size_t>(plane.bytes), stores);
    target += plane.bytes;
  }
  return state;
}

uint64_t scatter_block(const uint8_t* source, const PlaneSet& target, int64_t block,
                       uint64_t seed) {
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  const Stores stores = stores_for(target.block_bytes());
  uint64_t state = seed;
  for (const Plane& plane : target.planes()) {
    state = kernel.copy(state, plane.base + block * plane.stride, source,
                        static_cast<size_t>(plane.bytes), stores);
    source += plane.bytes;
  }
  return state;
}

uint64_t checksum_block(const uint8_t* source, int64_t bytes, uint64_t seed) {
  return fastest_checksum_kernel().update(seed, source, static_cast<size_t>(bytes));
}

void poison_block(const PlaneSet& target, int64_t block) {
  for (const Plane& plane : target.planes()) {
    std::memset(plane.base + block * plane.stride, 0xff, static_cast<size_t>(plane.bytes));
  }
}

}  // namespace kvx
