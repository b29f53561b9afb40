// Blocks between their places in host memory and one body of bytes: what an object store is sent,
// and what it answers. Checksummed in the same pass.
#pragma once

#include <cstdint>
#include <span>

#include "kvx/status.h"

namespace kvx {

// Of one body: block i is `block_bytes` at `offsets[i]` in it, and at `addresses[i]` in memory.
struct BodyBlocks {
  std::span<const int64_t> offsets;
  std::span<const int64_t> addresses;
  std::span<const uint8_t> keys;  // kKeyBytes a block
  int64_t block_bytes = 0;
};

// Both copy every block on the calling thread, and write the checksum of what was copied into
// `sums`, one a block. They judge no checksum: the caller knows what it should be. kUsage naming
// the first block that does not lie within the body, or arrays of other lengths; nothing was
// copied then.
//
// REQUIRES: the memory at each address holds block_bytes, and overlaps neither the body nor, in
// scatter, another one.
Status gather_into_body(const BodyBlocks& blocks, std::span<uint8_t> body,
                        std::span<uint64_t> sums);
Status scatter_from_body(const BodyBlocks& blocks, std::span<const uint8_t> body,
                         std::span<uint64_t> sums);

}  // namespace kvx
