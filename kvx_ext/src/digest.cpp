#include "kvx/digest.h"

#include <bit>
#include <cstring>
#include <utility>

namespace kvx {

namespace {

constexpr size_t kBlockBytes = 128;
constexpr size_t kRounds = 12;

constexpr std::array<uint64_t, 8> kInitial = {
    0x6a09e667f3bcc908, 0xbb67ae8584caa73b, 0x3c6ef372fe94f82b, 0xa54ff53a5f1d36f1,
    0x510e527fade682d1, 0x9b05688c2b3e6c1f, 0x1f83d9abfb41bd6b, 0x5be0cd19137e2179};

constexpr uint8_t kSchedule[10][16] = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                                       {14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3},
                                       {11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4},
                                       {7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8},
                                       {9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13},
                                       {2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9},
                                       {12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11},
                                       {13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10},
                                       {6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5},
                                       {10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0}};

inline void mix(uint64_t* v, size_t a, size_t b, size_t c, size_t d, uint64_t x, uint64_t y) {
  v[a] += v[b] + x;
  v[d] = std::rotr(v[d] ^ v[a], 32);
  v[c] += v[d];
  v[b] = std::rotr(v[b] ^ v[c], 24);
  v[a] += v[b] + y;
  v[d] = std::rotr(v[d] ^ v[a], 16);
  v[c] += v[d];
  v[b] = std::rotr(v[b] ^ v[c], 63);
}

template <size_t round>
inline void one_round(uint64_t* v, const uint64_t* m) {
  constexpr const uint8_t* s = kSchedule[round % 10];
  mix(v, 0, 4, 8, 12, m[s[0]], m[s[1]]);
  mix(v, 1, 5, 9, 13, m[s[2]], m[s[3]]);
  mix(v, 2, 6, 10, 14, m[s[4]], m[s[5]]);
  mix(v, 3, 7, 11, 15, m[s[6]], m[s[7]]);
  mix(v, 0, 5, 10, 15, m[s[8]], m[s[9]]);
  mix(v, 1, 6, 11, 12, m[s[10]], m[s[11]]);
  mix(v, 2, 7, 8, 13, m[s[12]], m[s[13]]);
  mix(v, 3, 4, 9, 14, m[s[14]], m[s[15]]);
}

// The rounds are unrolled so that the message schedule becomes constants: twice as fast.
template <size_t... rounds>
inline void all_rounds(uint64_t* v, const uint64_t* m, std::index_sequence<rounds...>) {
  (one_round<rounds>(v, m), ...);
}

void compress(std::array<uint64_t, 8>& state, const uint8_t* block, uint64_t bytes_so_far,
              bool is_last) {
  uint64_t m[16];
  static_assert(std::endian::native == std::endian::little);
  std::memcpy(m, block, kBlockBytes);
  uint64_t v[16];
  for (size_t i = 0; i < 8; ++i) {
    v[i] = state[i];
    v[i + 8] = kInitial[i];
  }
  v[12] ^= bytes_so_far;
  if (is_last) v[14] = ~v[14];
  all_rounds(v, m, std::make_index_sequence<kRounds>{});
  for (size_t i = 0; i < 8; ++i) state[i] ^= v[i] ^ v[i + 8];
}

}  // namespace

KeyDigest::KeyDigest(const uint8_t* fingerprint) : keyed_state_(kInitial) {
  keyed_state_[0] ^= 0x01010000 ^ (kFingerprintBytes << 8) ^ kDigestBytes;
  uint8_t block[kBlockBytes] = {};
  std::memcpy(block, fingerprint, kFingerprintBytes);
  compress(keyed_state_, block, kBlockBytes, false);
}

void KeyDigest::digest(const uint8_t* hashes, size_t count, size_t hash_bytes,
                       uint8_t* keys) const {
  uint8_t block[kBlockBytes] = {};
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(block, hashes + i * hash_bytes, hash_bytes);
    std::array<uint64_t, 8> state = keyed_state_;
    compress(state, block, kBlockBytes + hash_bytes, true);
    std::memcpy(keys + i * kDigestBytes, state.data(), kDigestBytes);
  }
}

}  // namespace kvx
