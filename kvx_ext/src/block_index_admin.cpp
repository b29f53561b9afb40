// Owners, recovery and statistics.
#include <algorithm>
#include <numeric>
#include <utility>

#include "block_index_core.h"

namespace kvx {

Status BlockIndex::set_owner_limit(int32_t owner, int64_t slots_max, Removed* evicted) {
  const Call call(*core_);
  if (slots_max < -1) return {Code::kUsage, "an owner's limit is -1 (none) or a number of slots"};
  uint16_t at;
  const Status status = core_->find_owner(owner, &at);
  if (!status.ok()) return status;
  core_->owners[at].limit = slots_max;
  while (slots_max >= 0 && core_->owners[at].used > slots_max) {
    if (!core_->evict_one(at, evicted)) break;
  }
  return Status::Ok();
}

int64_t BlockIndex::owner_used(int32_t owner) {
  const Call call(*core_);
  const auto known = core_->owner_of_id.find(owner);
  return known == core_->owner_of_id.end() ? 0 : core_->owners[known->second].used;
}

bool BlockIndex::Core::restore_one(const RestoredBlocks& from, size_t row, uint16_t owner) {
  const int64_t slot_number = from.places.slots[row];
  const int64_t expiry_s = from.expiry_s[row];
  if (slot_number < 0 || static_cast<size_t>(slot_number) >= blocks.size()) return false;
  const auto slot = static_cast<uint32_t>(slot_number);
  const uint64_t hash = from.keys[row].hash();
  Block& block = blocks[slot];
  Owner& payer = owners[owner];
  if (block.state != SlotState::kFree || table.find(hash, from.keys[row]) != kNoSlot) return false;
  if (payer.limit >= 0 && payer.used >= payer.limit) return false;
  free.unlink(links.data(), slot);
  ++payer.used;
  block.key = from.keys[row];
  block.checksum = from.checksums[row];
  block.generation = from.places.generations[row];
  block.state = SlotState::kCommitted;
  block.flags = expiry_s > 0 ? kExpires : 0;
  links[slot].expiry_s =
      static_cast<uint32_t>(std::clamp<int64_t>(expiry_s, 0, int64_t{UINT32_MAX}));
  links[slot].owner = owner;
  table.insert(hash, slot);
  order.restore(slot, from.frequencies[row]);
  ++stats.committed;
  ++stats.inserted;
  if (expiry_s > 0) ++stats.expiring;
  return true;
}

Status BlockIndex::restore(const RestoredBlocks& from, std::span<uint8_t> is_done) {
  const Call call(*core_);
  for (size_t i = 0; i < from.keys.size(); ++i) {
    uint16_t owner;
    const Status status = core_->find_owner(from.owners[i], &owner);
    if (!status.ok()) return status;
    is_done[i] = core_->restore_one(from, i, owner);
  }
  return Status::Ok();
}

IndexSnapshot BlockIndex::snapshot() {
  const Call call(*core_);
  const Links* links = core_->links.data();
  // (level, tick, slot): the order of eviction, up to blocks that came back from being parked.
  std::vector<std::tuple<size_t, uint64_t, uint32_t>> ranked;
  ranked.reserve(static_cast<size_t>(core_->stats.committed));
  for (uint32_t slot = 0; slot < core_->blocks.size(); ++slot) {
    if (core_->blocks[slot].state != SlotState::kCommitted) continue;
    ranked.emplace_back(core_->order.level(slot), links[slot].tick, slot);
  }
  std::sort(ranked.begin(), ranked.end());
  IndexSnapshot out;
  for (const auto& [level, tick, slot] : ranked) {
    const Block& block = core_->blocks[slot];
    out.keys.push_back(block.key);
    out.slots.push_back(slot);
    out.generations.push_back(block.generation);
    out.checksums.push_back(block.checksum);
    out.frequencies.push_back(core_->order.frequency(slot));
    out.ticks.push_back(tick);
    out.expiry_s.push_back(block.has(kExpires) ? links[slot].expiry_s : 0);
    out.owners.push_back(core_->owners[links[slot].owner].id);
    out.pins.push_back(block.pins);
    out.is_dirty.push_back(block.has(kDirty) ? 1 : 0);
  }
  return out;
}

IndexStats BlockIndex::stats() {
  const Call call(*core_);
  IndexStats stats = core_->stats;
  stats.slots_free = core_->free.size;
  stats.leases = static_cast<int64_t>(core_->leases.size());
  stats.owners = static_cast<int64_t>(core_->owners.size());
  stats.memory_bytes = core_->memory_bytes();
  stats.history_memory_bytes = core_->history == nullptr ? 0 : core_->history->memory_bytes();
  return stats;
}

int64_t BlockIndex::Core::memory_bytes() const {
  return static_cast<int64_t>(sizeof(*this)) + blocks.memory_bytes() + links.memory_bytes() +
         table.memory_bytes() + order.memory_bytes() +
         static_cast<int64_t>(owners.capacity() * sizeof(Owner) +
                              removals.capacity() * sizeof(MissHistory::Removal));
}

Status BlockIndex::check_integrity() {
  const Call call(*core_);
  return core_->check();
}

}  // namespace kvx
