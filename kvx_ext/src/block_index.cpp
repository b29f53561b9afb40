// Slots and writing: add, retire, reserve, commit, abort, insert.
#include "kvx/block_index.h"

#include <algorithm>
#include <string>

#include "block_index_core.h"

namespace kvx {

namespace {

// Rounded up, so that no block expires early; 0 is kept for "never".
uint32_t expiry_of(const WriteOptions& options) {
  if (options.ttl_s == 0) return 0;
  const uint64_t expiry_s = (options.now_ms + 999) / 1000 + options.ttl_s;
  return static_cast<uint32_t>(std::min<uint64_t>(expiry_s, UINT32_MAX));
}

}  // namespace

BlockIndex::BlockIndex(EvictionPolicy policy, std::shared_ptr<MissHistory> history)
    : core_(std::make_unique<Core>(policy, std::move(history))) {}

BlockIndex::~BlockIndex() = default;

const std::shared_ptr<MissHistory>& BlockIndex::history() const { return core_->history; }

Status BlockIndex::add_slots(int64_t first, int64_t count) {
  const Call call(*core_);
  if (first < 0 || count < 0 || first > kSlotsMax - count) {
    return {Code::kUsage, "slots are numbered 0 to " + std::to_string(kSlotsMax - 1)};
  }
  const auto end = static_cast<size_t>(first + count);
  for (size_t slot = static_cast<size_t>(first); slot < std::min(end, core_->blocks.size());
       ++slot) {
    if (core_->blocks[slot].state != SlotState::kAbsent) {
      return {Code::kUsage, "slot " + std::to_string(slot) + " is in the pool already"};
    }
  }
  if (end > core_->blocks.size()) {
    const Status status = core_->resize(end);
    if (!status.ok()) return status;
  }
  // Backwards, because the free list is a stack: the lowest slot is taken first.
  for (size_t slot = end; slot-- > static_cast<size_t>(first);) {
    core_->make_free(static_cast<uint32_t>(slot));
  }
  core_->stats.slots_total += count;
  return Status::Ok();
}

Status BlockIndex::retire_slots(int64_t first, int64_t count, bool* is_retired, Removed* removed) {
  const Call call(*core_);
  *is_retired = false;
  const auto known = static_cast<int64_t>(core_->blocks.size());
  if (first < 0 || count < 0 || first > known - count) {
    return {Code::kUsage, "slots beyond " + std::to_string(known) + " are not in the pool"};
  }
  const auto end = static_cast<uint32_t>(first + count);
  bool is_held = false;
  for (auto slot = static_cast<uint32_t>(first); slot < end; ++slot) {
    const Block& block = core_->blocks[slot];
    if (block.state == SlotState::kAbsent) {
      return {Code::kUsage, "slot " + std::to_string(slot) + " is not in the pool"};
    }
    const bool is_idle = block.state == SlotState::kFree ||
                         (block.state == SlotState::kCommitted && block.pins == 0);
    is_held |= !is_idle;
  }
  if (is_held) return Status::Ok();
  for (auto slot = static_cast<uint32_t>(first); slot < end; ++slot) {
    if (core_->blocks[slot].state == SlotState::kCommitted) {
      core_->detach(slot, RemovalReason::kRetired, removed);
    }
    core_->free.unlink(core_->links.data(), slot);
    core_->blocks[slot].state = SlotState::kAbsent;
    ++core_->blocks[slot].generation;
  }
  core_->stats.slots_total -= count;
  *is_retired = true;
  return Status::Ok();
}

ReserveOutcome BlockIndex::Core::reserve_one(const BlockKey& key, uint64_t hash,
                                             const WriteOptions& options, uint16_t owner,
                                             uint32_t* slot, Removed* evicted) {
  *slot = blocks.size() == 0 ? kNoSlot : table.find(hash, key);
  if (*slot != kNoSlot) {
    if (blocks[*slot].state == SlotState::kReserved) return ReserveOutcome::kInFlight;
    if (!is_expired(*slot, options.now_ms)) return ReserveOutcome::kExists;
    detach(*slot, RemovalReason::kExpired, evicted);
    ++stats.expired;
  }
  ReserveOutcome outcome;
  *slot = take_slot(owner, evicted, &outcome);
  if (*slot == kNoSlot) return outcome;
  Block& block = blocks[*slot];
  block.key = key;
  block.checksum = 0;
  ++block.generation;
  block.state = SlotState::kReserved;
  block.flags =
      static_cast<uint8_t>((options.is_dirty ? kDirty : 0) | (options.ttl_s != 0 ? kExpires : 0));
  links[*slot].expiry_s = expiry_of(options);
  table.insert(hash, *slot);
  ++stats.reserved;
  if (options.is_dirty) ++stats.dirty;
  return outcome;
}

void BlockIndex::Core::reserve(std::span<const BlockKey> keys, const WriteOptions& options,
                               uint16_t owner, const Reservations& rows, Removed* evicted) {
  Probe ahead;
  for (size_t base = 0; base < keys.size(); base += kGroup) {
    const size_t count = std::min(kGroup, keys.size() - base);
    probe(keys.subspan(base, count), &ahead);
    prefetch_allocations(owner, count);
    for (size_t i = 0; i < count; ++i) {
      uint32_t slot = kNoSlot;
      const ReserveOutcome outcome =
          reserve_one(keys[base + i], ahead.hashes[i], options, owner, &slot, evicted);
      const bool is_placed =
          outcome == ReserveOutcome::kReserved || outcome == ReserveOutcome::kExists;
      rows.outcomes[base + i] = static_cast<uint8_t>(outcome);
      rows.slots[base + i] = is_placed ? int64_t{slot} : -1;
      rows.generations[base + i] = is_placed ? blocks[slot].generation : 0;
    }
  }
}

Status BlockIndex::reserve(std::span<const BlockKey> keys, const WriteOptions& options,
                           std::span<uint8_t> outcomes, std::span<int64_t> slots,
                           std::span<uint32_t> generations, Removed* evicted) {
  const Call call(*core_);
  uint16_t owner;
  const Status status = core_->find_owner(options.owner, &owner);
  if (!status.ok()) return status;
  core_->reserve(keys, options, owner, {outcomes, slots, generations}, evicted);
  return Status::Ok();
}

Status BlockIndex::insert(std::span<const BlockKey> keys, std::span<const uint64_t> checksums,
                          const WriteOptions& options, std::span<uint8_t> outcomes,
                          std::span<int64_t> slots, std::span<uint32_t> generations,
                          Removed* evicted) {
  const Call call(*core_);
  uint16_t owner;
  const Status status = core_->find_owner(options.owner, &owner);
  if (!status.ok()) return status;
  core_->reserve(keys, options, owner, {outcomes, slots, generations}, evicted);
  for (size_t i = keys.size(); i-- > 0;) {
    if (outcomes[i] != static_cast<uint8_t>(ReserveOutcome::kReserved)) continue;
    const auto slot = static_cast<uint32_t>(slots[i]);
    core_->blocks[slot].checksum = checksums[i];
    core_->admit(slot, keys[i].hash());
  }
  return Status::Ok();
}

void BlockIndex::commit(References reserved, std::span<const uint64_t> checksums,
                        std::span<uint8_t> is_done) {
  const Call call(*core_);
  for (size_t i = reserved.slots.size(); i-- > 0;) {
    const uint32_t slot = core_->resolve(reserved.slots[i], reserved.generations[i]);
    is_done[i] = 0;
    if (slot == kNoSlot) continue;
    Block& block = core_->blocks[slot];
    if (block.state == SlotState::kCancelled) core_->forget_reservation(slot);
    if (block.state != SlotState::kReserved) continue;
    block.checksum = checksums[i];
    core_->admit(slot, block.key.hash());
    is_done[i] = 1;
  }
}

void BlockIndex::abort(References reserved, std::span<uint8_t> is_done) {
  const Call call(*core_);
  Removed ignored;  // never visible, so nobody is told that it left
  for (size_t i = 0; i < reserved.slots.size(); ++i) {
    const uint32_t slot = core_->resolve(reserved.slots[i], reserved.generations[i]);
    is_done[i] = 0;
    if (slot == kNoSlot) continue;
    const SlotState state = core_->blocks[slot].state;
    if (state != SlotState::kReserved && state != SlotState::kCancelled) continue;
    if (state == SlotState::kReserved) core_->detach(slot, RemovalReason::kFailed, &ignored);
    core_->forget_reservation(slot);
    ++core_->stats.aborted;
    is_done[i] = 1;
  }
}

}  // namespace kvx
