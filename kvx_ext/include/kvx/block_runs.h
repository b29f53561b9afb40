// From blocks on two sides to the runs of bytes that a device copies.
//
//   CopyRuns runs;
//   Status status = pair_blocks(targets, target_base, sources, source_base, &runs);
#pragma once

#include <cstdint>
#include <span>

#include "kvx/copy_plan.h"
#include "kvx/descriptor.h"
#include "kvx/status.h"

namespace kvx {

// Walks the canonical bytes of both sides in step, whatever their strides. kUsage: the totals of a
// block differ. REQUIRES: the descriptors were validated against their regions.
Status pair_blocks(std::span<const Descriptor> targets, uint64_t target_base,
                   std::span<const Descriptor> sources, uint64_t source_base, CopyRuns* runs);

// The number of a block that has bytes in common with another one, or -1. What a device copies in
// any order may not overlap. REQUIRES: as above.
int64_t find_overlap(std::span<const Descriptor> blocks);

}  // namespace kvx
