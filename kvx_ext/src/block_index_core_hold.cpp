// Pins, dirt and leases: what keeps a block from being evicted, and what happens when it ends.
#include "block_index_core.h"

namespace kvx {

bool BlockIndex::Core::add_pin(uint32_t slot) {
  Block& block = blocks[slot];
  if (block.pins == kPinsMax) return false;
  if (++block.pins == 1) ++stats.pinned;
  return true;
}

void BlockIndex::Core::drop_pin(uint32_t slot) {
  Block& block = blocks[slot];
  if (--block.pins > 0) return;
  --stats.pinned;
  if (block.state == SlotState::kDoomed) {
    --stats.doomed;
    finish(slot);
    return;
  }
  if (block.has(kFlushing)) undo_flush(slot);
  unpark_if_free(slot);
}

// A flush ended without mark_clean(), so the block is to be flushed again.
void BlockIndex::Core::undo_flush(uint32_t slot) {
  Block& block = blocks[slot];
  block.flags &= static_cast<uint8_t>(~kFlushing);
  if (block.has(kParked)) {
    parked_dirty.push_hot(links.data(), slot);
  } else {
    order.rewind_hand(slot);
  }
}

void BlockIndex::Core::clean(uint32_t slot) {
  Block& block = blocks[slot];
  if (!block.has(kDirty)) return;
  if (block.has(kParked) && block.needs_flush()) parked_dirty.unlink(links.data(), slot);
  block.flags &= static_cast<uint8_t>(~(kDirty | kFlushing));
  --stats.dirty;
  if (block.state == SlotState::kCommitted) unpark_if_free(slot);
}

void BlockIndex::Core::park(uint32_t slot) {
  Block& block = blocks[slot];
  order.unlink(slot);
  block.flags |= kParked;
  if (block.needs_flush()) parked_dirty.push_hot(links.data(), slot);
}

void BlockIndex::Core::unpark_if_free(uint32_t slot) {
  Block& block = blocks[slot];
  if (!block.has(kParked) || !block.may_be_evicted()) return;
  const auto end = block.has(kTouchedParked) ? EvictionOrder::End::kHot : EvictionOrder::End::kCold;
  block.flags &= static_cast<uint8_t>(~(kParked | kTouchedParked));
  order.link(slot, end, false);
}

void BlockIndex::Core::touch(uint32_t slot) {
  Block& block = blocks[slot];
  if (!block.has(kParked)) {
    order.touch(slot, block.needs_flush());
    return;
  }
  if (order.touch_unlinked(slot)) block.flags |= kTouchedParked;
}

void BlockIndex::Core::drop_lease(std::map<int64_t, Lease>::iterator lease) {
  const Lease& held = lease->second;
  for (size_t i = 0; i < held.slots.size(); ++i) {
    // Checked again: a caller's unpin() too many may have ended the block under the lease.
    const uint32_t slot = resolve(held.slots[i], held.generations[i]);
    if (slot != kNoSlot && blocks[slot].pins > 0) drop_pin(slot);
  }
  leases_due.erase({lease->second.expires_ms, lease->first});
  leases.erase(lease);
}

}  // namespace kvx
