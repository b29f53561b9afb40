// Blocks between an engine's planes and their canonical bytes, checksummed in the same pass.
//
// A plane is one run per block: block b of it lies at base + b * stride. The canonical form of a
// block is its planes' runs one after the other; it is what slots, files and peers hold.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvx/status.h"

namespace kvx {

struct Plane {
  uint8_t* base = nullptr;
  int64_t stride = 0;
  int64_t bytes = 0;  // of one block
};

// The planes of one engine region set. Neighbours that touch on both sides are merged at creation,
// so that a block-first cache is one plane and one copy whatever its number of layers; not so where
// layers have to be told apart.
class PlaneSet {
 public:
  explicit PlaneSet(std::span<const Plane> planes, bool merges = true);

  const std::vector<Plane>& planes() const { return planes_; }
  int64_t block_bytes() const { return block_bytes_; }

 private:
  std::vector<Plane> planes_;
  int64_t block_bytes_ = 0;
};

// Both return the checksum of the canonical bytes. REQUIRES: target/source hold block_bytes().
[[nodiscard]] uint64_t gather_block(const PlaneSet& source, int64_t block, uint8_t* target,
                                    uint64_t seed);
[[nodiscard]] uint64_t scatter_block(const uint8_t* source, const PlaneSet& target, int64_t block,
                                     uint64_t seed);
[[nodiscard]] uint64_t checksum_block(const uint8_t* source, int64_t bytes, uint64_t seed);

// Overwrites a block with 0xFF (NaN in every KV dtype) after its bytes proved wrong, so that a
// caller who ignores the result cannot mistake them for KV.
void poison_block(const PlaneSet& target, int64_t block);

}  // namespace kvx
