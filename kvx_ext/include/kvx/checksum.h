// Block checksums: CRC-64/NVME, seeded with the block's key and length, folded into the copy.
//
// The seed makes the same bytes under another key, or a block cut short, a different checksum: a
// CRC is a bijection of its initial state for fixed bytes, so two keys never agree by accident of
// content. It depends on nothing but key and length, so it travels unchanged from tier to tier.
// All kernels give the same value; the fastest one that this CPU offers is chosen once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kvx {

inline constexpr size_t kKeyBytes = 16;

// The state to start a block's checksum from. `key` points to kKeyBytes bytes.
[[nodiscard]] uint64_t block_seed(const uint8_t* key, uint64_t block_bytes);

enum class Stores : uint8_t {
  kCached,     // ordinary stores: the target will be read soon, or is small
  kStreaming,  // non-temporal stores: the target is large and will not be read by this CPU soon
};

struct ChecksumKernel {
  std::string_view name;
  // Continues `state` over bytes and returns the new state. Pure.
  uint64_t (*update)(uint64_t state, const uint8_t* source, size_t bytes);
  // The same, copying source to target in the same pass. REQUIRES: the ranges do not overlap.
  uint64_t (*copy)(uint64_t state, uint8_t* target, const uint8_t* source, size_t bytes,
                   Stores stores);
  // A copy alone with the same stores: the limit that benchmarks compare `copy` with.
  void (*copy_only)(uint8_t* target, const uint8_t* source, size_t bytes, Stores stores);
};

// Every kernel this CPU can run, fastest first; the last one is portable C++.
[[nodiscard]] std::span<const ChecksumKernel> checksum_kernels();

[[nodiscard]] inline const ChecksumKernel& fastest_checksum_kernel() {
  return checksum_kernels().front();
}

}  // namespace kvx
