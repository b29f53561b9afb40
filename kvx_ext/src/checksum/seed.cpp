#include <cstring>

#include "kvx/checksum.h"

namespace kvx {

namespace {

// The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection that spreads every bit.
constexpr uint64_t spread(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

}  // namespace

uint64_t block_seed(const uint8_t* key, uint64_t block_bytes) {
  uint64_t words[2];
  static_assert(sizeof(words) == kKeyBytes);
  std::memcpy(words, key, sizeof(words));
  return spread(words[0] ^ spread(words[1] ^ spread(block_bytes)));
}

}  // namespace kvx
