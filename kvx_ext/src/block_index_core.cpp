#include "block_index_core.h"

#include <algorithm>
#include <string>

namespace kvx {

namespace {

constexpr size_t kOwnersMax = 65535;

}  // namespace

Status BlockIndex::Core::resize(size_t slot_count) {
  // Grown into copies first, so that a refusal leaves everything as it was.
  Status status = blocks.resize(slot_count);
  if (status.ok()) status = links.resize(slot_count);
  if (!status.ok()) return status;
  KeyTable grown;
  status = grown.create(blocks.data(), slot_count);
  if (!status.ok()) return status;
  for (uint32_t slot = 0; slot < slot_count; ++slot) {
    if (blocks[slot].is_named()) grown.insert(blocks[slot].key.hash(), slot);
  }
  table.swap(grown);
  return order.attach(links.data(), slot_count);
}

Status BlockIndex::Core::find_owner(int32_t id, uint16_t* owner) {
  const auto known = owner_of_id.find(id);
  if (known != owner_of_id.end()) {
    *owner = known->second;
    return Status::Ok();
  }
  if (owners.size() >= kOwnersMax) {
    return {Code::kUsage, "an index knows at most " + std::to_string(kOwnersMax) + " owners"};
  }
  *owner = static_cast<uint16_t>(owners.size());
  owners.push_back({id, 0, -1});
  owner_of_id.emplace(id, *owner);
  order.grow_owners(owners.size());
  return Status::Ok();
}

void BlockIndex::Core::make_free(uint32_t slot) {
  blocks[slot].state = SlotState::kFree;
  blocks[slot].flags = 0;
  free.push_hot(links.data(), slot);
}

uint32_t BlockIndex::Core::take_free() {
  const uint32_t slot = free.hot;
  if (slot != kNoSlot) free.unlink(links.data(), slot);
  return slot;
}

void BlockIndex::Core::finish(uint32_t slot) {
  ++blocks[slot].generation;
  --owners[links[slot].owner].used;
  make_free(slot);
}

void BlockIndex::Core::forget_reservation(uint32_t slot) {
  --stats.reserved;
  if (blocks[slot].has(kDirty)) --stats.dirty;
  finish(slot);
}

void BlockIndex::Core::detach(uint32_t slot, RemovalReason reason, Removed* removed) {
  Block& block = blocks[slot];
  const uint64_t hash = block.key.hash();
  table.erase(hash, slot);
  if (history != nullptr) removals.push_back({hash, reason});
  removed->keys.push_back(block.key);
  removed->slots.push_back(slot);
  removed->owners.push_back(owners[links[slot].owner].id);
  if (block.state == SlotState::kReserved) {
    block.state = SlotState::kCancelled;
    return;
  }
  if (!block.has(kParked)) {
    order.unlink(slot);
    if (reason == RemovalReason::kEvicted) order.remember_evicted(slot, hash);
  } else if (block.needs_flush()) {
    parked_dirty.unlink(links.data(), slot);
  }
  --stats.committed;
  if (block.has(kDirty)) --stats.dirty;
  if (block.has(kExpires)) --stats.expiring;
  block.flags = 0;
  if (block.pins > 0) {
    block.state = SlotState::kDoomed;
    ++stats.doomed;
    return;
  }
  finish(slot);
}

bool BlockIndex::Core::evict_one(int64_t owner, Removed* evicted) {
  for (;;) {
    const uint32_t slot = order.coldest(owner);
    if (slot == kNoSlot) return false;
    if (!blocks[slot].may_be_evicted()) {
      park(slot);
      continue;
    }
    detach(slot, RemovalReason::kEvicted, evicted);
    ++stats.evicted;
    return true;
  }
}

uint32_t BlockIndex::Core::take_slot(uint16_t owner, Removed* evicted, ReserveOutcome* outcome) {
  Owner& payer = owners[owner];
  while (payer.limit >= 0 && payer.used >= payer.limit) {
    if (evict_one(owner, evicted)) continue;
    *outcome = ReserveOutcome::kQuota;
    return kNoSlot;
  }
  if (free.size == 0 && !evict_one(kAnyOwner, evicted)) {
    *outcome = ReserveOutcome::kNoSpace;
    return kNoSlot;
  }
  const uint32_t slot = take_free();
  ++payer.used;
  links[slot].owner = owner;
  *outcome = ReserveOutcome::kReserved;
  return slot;
}

void BlockIndex::Core::admit(uint32_t slot, uint64_t hash) {
  Block& block = blocks[slot];
  block.state = SlotState::kCommitted;
  order.admit(slot, hash, block.needs_flush());
  --stats.reserved;
  ++stats.committed;
  ++stats.inserted;
  if (block.has(kExpires)) ++stats.expiring;
}

void BlockIndex::Core::flush_history() {
  if (removals.empty()) return;
  history->record(removals);
  removals.clear();
}

void BlockIndex::Core::probe(std::span<const BlockKey> keys, Probe* probe) const {
  if (blocks.size() == 0) {
    std::fill_n(probe->guesses, keys.size(), kNoSlot);
    return;
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    probe->hashes[i] = keys[i].hash();
    table.prefetch(probe->hashes[i]);
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    probe->guesses[i] = table.guess(probe->hashes[i]);
    if (probe->guesses[i] != kNoSlot) __builtin_prefetch(&blocks[probe->guesses[i]]);
  }
}

void BlockIndex::Core::prefetch_allocations(uint16_t owner, size_t count) const {
  uint32_t slots[kGroup];
  count = std::min(count, kGroup);
  size_t known = 0;
  for (uint32_t slot = free.hot; slot != kNoSlot && known < count; slot = links[slot].colder) {
    __builtin_prefetch(&blocks[slot], 1);
    ++known;
  }
  if (known == count) return;
  const Owner& payer = owners[owner];
  const bool is_limited = payer.limit >= 0 && payer.used >= payer.limit;
  known = order.peek(is_limited ? owner : kAnyOwner, {slots, count - known});
  for (size_t i = 0; i < known; ++i) __builtin_prefetch(&blocks[slots[i]], 1);
  for (size_t i = 0; i < known; ++i) table.prefetch(blocks[slots[i]].key.hash());
}

}  // namespace kvx
