// What must be true of a BlockIndex between calls, each named by its error.
#include <string>

#include "block_index_core.h"

namespace kvx {

namespace {

Status broken(const std::string& what, uint32_t slot) {
  return {Code::kCorrupt, "slot " + std::to_string(slot) + ": " + what};
}

Status check_block(const Block& block, uint32_t slot) {
  const bool is_committed = block.state == SlotState::kCommitted;
  if (block.pins > 0 && !is_committed && block.state != SlotState::kDoomed) {
    return broken("pinned and neither committed nor doomed", slot);
  }
  if (block.state == SlotState::kDoomed && block.pins == 0) {
    return broken("doomed and not pinned", slot);
  }
  if (block.has(kParked) && (!is_committed || block.may_be_evicted())) {
    return broken("parked although nothing holds it", slot);
  }
  if (block.has(kTouchedParked) && !block.has(kParked)) return broken("touched flag left", slot);
  if (block.has(kFlushing) && (!block.has(kDirty) || block.pins == 0)) {
    return broken("flushing and not both dirty and pinned", slot);
  }
  return Status::Ok();
}

}  // namespace

Status BlockIndex::Core::check() const {
  IndexStats seen;
  int64_t named = 0;
  int64_t linked = 0;
  uint32_t parked_dirty_count = 0;
  std::vector<int64_t> used(owners.size());
  for (uint32_t slot = 0; slot < blocks.size(); ++slot) {
    const Block& block = blocks[slot];
    if (block.state == SlotState::kAbsent) continue;
    const Status status = check_block(block, slot);
    if (!status.ok()) return status;
    ++seen.slots_total;
    if (block.state == SlotState::kFree) {
      ++seen.slots_free;
      continue;
    }
    ++used[links[slot].owner];
    const bool is_committed = block.state == SlotState::kCommitted;
    seen.committed += is_committed;
    seen.doomed += block.state == SlotState::kDoomed;
    seen.reserved += block.state == SlotState::kReserved || block.state == SlotState::kCancelled;
    seen.pinned += block.pins > 0;
    seen.dirty += block.has(kDirty);
    seen.expiring += is_committed && block.has(kExpires);
    named += block.is_named();
    linked += is_committed && !block.has(kParked);
    parked_dirty_count += block.has(kParked) && block.needs_flush();
  }
  auto wrong = [](const char* what) {
    return Status{Code::kCorrupt, std::string("wrong ") + what};
  };
  if (seen.slots_total != stats.slots_total) return wrong("number of slots");
  if (seen.slots_free != free.size) return wrong("size of the free list");
  if (seen.committed != stats.committed) return wrong("number of committed blocks");
  if (seen.doomed != stats.doomed) return wrong("number of doomed blocks");
  if (seen.reserved != stats.reserved) return wrong("number of reserved slots");
  if (seen.pinned != stats.pinned) return wrong("number of pinned blocks");
  if (seen.dirty != stats.dirty) return wrong("number of dirty blocks");
  if (seen.expiring != stats.expiring) return wrong("number of expiring blocks");
  if (parked_dirty_count != parked_dirty.size) return wrong("list of parked dirty blocks");
  if (leases.size() != leases_due.size()) return wrong("queue of leases");
  for (size_t i = 0; i < owners.size(); ++i) {
    if (owners[i].used != used[i]) return wrong("count of an owner's slots");
  }
  if (blocks.size() > 0 && table.check() != named) return wrong("hash map");
  return order.check(linked);
}

}  // namespace kvx
