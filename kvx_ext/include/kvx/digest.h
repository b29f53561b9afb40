// Block keys: BLAKE2b with a 16-byte digest, keyed by the namespace's fingerprint.
//
// The same as hashlib.blake2b(hash, key=fingerprint, digest_size=16), but for a whole batch in one
// call and with the keyed first block compressed only once. Source: RFC 7693.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace kvx {

class KeyDigest {
 public:
  static constexpr size_t kFingerprintBytes = 16;
  static constexpr size_t kDigestBytes = 16;
  static constexpr size_t kHashBytesMax = 128;  // one compression a hash

  explicit KeyDigest(const uint8_t* fingerprint);

  // REQUIRES: 0 < hash_bytes <= kHashBytesMax; hashes holds count * hash_bytes, keys count * 16.
  void digest(const uint8_t* hashes, size_t count, size_t hash_bytes, uint8_t* keys) const;

 private:
  std::array<uint64_t, 8> keyed_state_;
};

}  // namespace kvx
