// Checksums of blocks where they lie: rows at a stride in a region, without copying them.
//
// For bytes that somebody else moved (a network card, another library), which can only be verified
// afterwards. Where kvx itself copies, the checksum comes out of the copy and costs nothing.
#pragma once

#include <cstdint>
#include <span>

#include "kvx/descriptor.h"
#include "kvx/status.h"

namespace kvx {

// Writes the checksum of each block's canonical bytes into `sums`, one a block. `keys` holds
// kKeyBytes a block, or nothing: zeros. kUsage naming the first block that does not lie within
// `memory`, or arrays of other lengths; nothing was read then.
Status row_checksums(std::span<const uint8_t> memory, std::span<const Descriptor> blocks,
                     std::span<const uint8_t> keys, std::span<uint64_t> sums);

}  // namespace kvx
