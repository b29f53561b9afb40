// Holding, removing and flushing: pins, leases, expiry, remove, dirty blocks.
#include <algorithm>

#include "block_index_core.h"

namespace kvx {

void BlockIndex::pin(References references, std::span<uint8_t> is_done) {
  const Call call(*core_);
  for (size_t i = 0; i < references.slots.size(); ++i) {
    const uint32_t slot = core_->resolve(references.slots[i], references.generations[i]);
    is_done[i] = slot != kNoSlot && core_->blocks[slot].state == SlotState::kCommitted &&
                 core_->add_pin(slot);
  }
}

void BlockIndex::unpin(References references, std::span<uint8_t> is_done) {
  const Call call(*core_);
  for (size_t i = 0; i < references.slots.size(); ++i) {
    const uint32_t slot = core_->resolve(references.slots[i], references.generations[i]);
    is_done[i] = slot != kNoSlot && core_->blocks[slot].pins > 0;
    if (is_done[i] != 0) core_->drop_pin(slot);
  }
}

Status BlockIndex::lease(References references, uint64_t expires_ms, int64_t* lease_id) {
  const Call call(*core_);
  for (size_t i = 0; i < references.slots.size(); ++i) {
    const uint32_t slot = core_->resolve(references.slots[i], references.generations[i]);
    if (slot == kNoSlot || core_->blocks[slot].state != SlotState::kCommitted) {
      return {Code::kStale, "row " + std::to_string(i) + " of the lease is no longer there"};
    }
  }
  const Status status = core_->use_rows(references.slots, {.is_pin = true});
  if (!status.ok()) return status;
  *lease_id = core_->next_lease++;
  if (expires_ms == 0) expires_ms = UINT64_MAX;
  Core::Lease made{expires_ms,
                   {references.slots.begin(), references.slots.end()},
                   {references.generations.begin(), references.generations.end()}};
  core_->leases.emplace(*lease_id, std::move(made));
  core_->leases_due.emplace(expires_ms, *lease_id);
  return Status::Ok();
}

bool BlockIndex::release(int64_t lease_id) {
  const Call call(*core_);
  const auto lease = core_->leases.find(lease_id);
  if (lease == core_->leases.end()) return false;
  core_->drop_lease(lease);
  return true;
}

bool BlockIndex::lease_is_live(int64_t lease_id, uint64_t now_ms) {
  const Call call(*core_);
  const auto lease = core_->leases.find(lease_id);
  return lease != core_->leases.end() && now_ms < lease->second.expires_ms;
}

Removed BlockIndex::expire(uint64_t now_ms, int64_t slots_max) {
  const Call call(*core_);
  while (!core_->leases_due.empty() && core_->leases_due.begin()->first <= now_ms) {
    core_->drop_lease(core_->leases.find(core_->leases_due.begin()->second));
    ++core_->stats.leases_expired;
  }
  Removed expired;
  const size_t slot_count = core_->blocks.size();
  const size_t steps = std::min(static_cast<size_t>(std::max<int64_t>(slots_max, 0)), slot_count);
  for (size_t i = 0; i < steps && core_->stats.expiring > 0; ++i) {
    if (core_->sweep_at >= slot_count) core_->sweep_at = 0;
    const auto slot = static_cast<uint32_t>(core_->sweep_at++);
    const bool is_due =
        core_->blocks[slot].state == SlotState::kCommitted && core_->is_expired(slot, now_ms);
    if (!is_due) continue;
    core_->detach(slot, RemovalReason::kExpired, &expired);
    ++core_->stats.expired;
  }
  return expired;
}

Removed BlockIndex::remove(std::span<const BlockKey> keys, RemovalReason reason) {
  const Call call(*core_);
  Removed removed;
  Core::Probe ahead;
  for (size_t base = 0; base < keys.size(); base += Core::kGroup) {
    const size_t rows = std::min(Core::kGroup, keys.size() - base);
    core_->probe(keys.subspan(base, rows), &ahead);
    for (size_t i = 0; i < rows; ++i) {
      if (ahead.guesses[i] == kNoSlot) continue;
      const uint32_t slot = core_->table.find(ahead.hashes[i], keys[base + i]);
      if (slot == kNoSlot) continue;
      core_->detach(slot, reason, &removed);
      ++core_->stats.removed;
    }
  }
  return removed;
}

Removed BlockIndex::clear() {
  const Call call(*core_);
  Removed removed;
  for (uint32_t slot = 0; slot < core_->blocks.size(); ++slot) {
    if (!core_->blocks[slot].is_named()) continue;
    core_->detach(slot, RemovalReason::kCleared, &removed);
    ++core_->stats.removed;
  }
  return removed;
}

void BlockIndex::mark_clean(References references, std::span<uint8_t> is_done) {
  const Call call(*core_);
  // Backwards: parked blocks return to the cold end, and the first row is the coldest.
  for (size_t i = references.slots.size(); i-- > 0;) {
    const uint32_t slot = core_->resolve(references.slots[i], references.generations[i]);
    is_done[i] = slot != kNoSlot && core_->is_readable(slot);
    if (is_done[i] != 0) core_->clean(slot);
  }
}

int64_t BlockIndex::take_dirty(std::span<BlockKey> keys, Places places) {
  const Call call(*core_);
  size_t taken = 0;
  while (taken < keys.size() && core_->stats.dirty > 0) {
    uint32_t slot = core_->parked_dirty.cold;
    if (slot != kNoSlot) {
      core_->parked_dirty.unlink(core_->links.data(), slot);
    } else {
      slot = core_->order.coldest_dirty(
          [this](uint32_t candidate) { return core_->blocks[candidate].needs_flush(); });
    }
    if (slot == kNoSlot) break;
    core_->blocks[slot].flags |= kFlushing;
    if (!core_->add_pin(slot)) {
      core_->undo_flush(slot);
      break;
    }
    keys[taken] = core_->blocks[slot].key;
    core_->place(slot, places, taken++);
  }
  return static_cast<int64_t>(taken);
}

}  // namespace kvx
