#include "kvx/digest.h"

#include <nanobind/ndarray.h>

#include <string>

#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

using Hashes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>>;

Keys block_keys(const Hashes& hashes, const nb::bytes& fingerprint) {
  if (fingerprint.size() != KeyDigest::kFingerprintBytes) {
    raise_if_error(
        {Code::kUsage, "fingerprint needs 16 bytes, not " + std::to_string(fingerprint.size())});
  }
  const size_t count = hashes.shape(0);
  const size_t hash_bytes = hashes.shape(1);
  if (hash_bytes == 0 || hash_bytes > KeyDigest::kHashBytesMax) {
    raise_if_error(
        {Code::kUsage, "a block hash needs 1..128 bytes, not " + std::to_string(hash_bytes)});
  }
  auto* keys = new uint8_t[count * KeyDigest::kDigestBytes];
  {
    nb::gil_scoped_release release;
    KeyDigest(reinterpret_cast<const uint8_t*>(fingerprint.c_str()))
        .digest(hashes.data(), count, hash_bytes, keys);
  }
  nb::capsule owner(keys, [](void* data) noexcept { delete[] static_cast<uint8_t*>(data); });
  return {keys, {count, KeyDigest::kDigestBytes}, owner};
}

}  // namespace

void bind_digest(nb::module_& module) {
  module.def("block_keys", &block_keys, "hashes"_a, "fingerprint"_a,
             "Keys of (n, k) uint8 hashes, 1 <= k <= 128, as (n, 16) uint8: for each row "
             "hashlib.blake2b(row, key=fingerprint, digest_size=16). Source: RFC 7693.");
}

}  // namespace kvx::bind
