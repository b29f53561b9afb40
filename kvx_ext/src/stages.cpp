#include "stages.h"

#include "kvx/checksum.h"
#include "kvx/copy.h"

namespace kvx {

namespace {

BlockOutcome judge(uint64_t computed, uint64_t expected) {
  return {computed == expected ? Code::kOk : Code::kCorrupt, computed};
}

}  // namespace

BlockOutcome run_stage(const Batch& batch, int64_t block, bool flips_bit) {
  const auto i = static_cast<size_t>(block);
  auto* slot = reinterpret_cast<uint8_t*>(batch.addresses[i]);
  const uint64_t seed =
      block_seed(&batch.keys[i * kKeyBytes], static_cast<uint64_t>(batch.block_bytes));
  const uint64_t flip = flips_bit ? 1 : 0;
  if (batch.kind == JobKind::kCopyIn) {
    // From the device the bytes are in the slot already.
    const uint64_t sum = batch.is_on_device ? checksum_block(slot, batch.block_bytes, seed)
                                            : gather_block(batch.planes, batch.ids[i], slot, seed);
    if (flips_bit) slot[0] ^= 1U;
    return {Code::kOk, sum};
  }
  if (!batch.has_planes() || batch.is_on_device) {
    return judge(checksum_block(slot, batch.block_bytes, seed) ^ flip, batch.checksums[i]);
  }
  const uint64_t sum = scatter_block(slot, batch.planes, batch.ids[i], seed) ^ flip;
  const BlockOutcome outcome = judge(sum, batch.checksums[i]);
  if (outcome.code != Code::kOk) poison_block(batch.planes, batch.ids[i]);
  return outcome;
}

}  // namespace kvx
