// What happens to one block on a copy thread: pure functions of the batch and the memory it names.
#pragma once

#include <cstdint>

#include "kvx/batch.h"

namespace kvx {

struct BlockOutcome {
  Code code = Code::kOk;
  uint64_t checksum = 0;
};

// Gathers, scatters or verifies block `block`. `flips_bit` is a failpoint: a gathered block is
// damaged after its checksum was taken, others as if a bit had been read wrong.
[[nodiscard]] inline int planes_of(const Batch& batch) {
  return static_cast<int>(batch.planes.planes().size());
}
[[nodiscard]] inline bool writes_slot(const Batch& batch) {
  return batch.kind == JobKind::kCopyIn && !batch.is_on_device;
}

[[nodiscard]] BlockOutcome run_stage(const Batch& batch, int64_t block, bool flips_bit);

}  // namespace kvx
