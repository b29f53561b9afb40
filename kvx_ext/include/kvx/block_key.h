// The 16 bytes a tier indexes blocks by: a cryptographic digest of namespace and block hash.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace kvx {

// Aligned to one byte on purpose: spans of keys lie over rows of arrays that Python owns.
struct BlockKey {
  std::array<uint8_t, 16> bytes{};

  friend bool operator==(const BlockKey& a, const BlockKey& b) {
    return std::memcmp(a.bytes.data(), b.bytes.data(), sizeof(a.bytes)) == 0;
  }

  // The digest is already uniform; the multiplication only keeps keys that are not digests (tests,
  // counters) from piling up in one place. Not a defence against chosen keys: the digest is.
  [[nodiscard]] uint64_t hash() const {
    uint64_t low;
    uint64_t high;
    std::memcpy(&low, bytes.data(), sizeof(low));
    std::memcpy(&high, bytes.data() + sizeof(low), sizeof(high));
    const uint64_t mixed = (low ^ (high << 32 | high >> 32)) * 0x9E3779B97F4A7C15;
    return mixed ^ (mixed >> 32);
  }
};
static_assert(sizeof(BlockKey) == 16 && alignof(BlockKey) == 1);

}  // namespace kvx
