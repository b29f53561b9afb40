// Reading: match, lookup, match_many, validate.
#include <algorithm>

#include "block_index_core.h"

namespace kvx {

bool BlockIndex::Core::pin_rows(std::span<const int64_t> slots) {
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] < 0 || add_pin(static_cast<uint32_t>(slots[i]))) continue;
    for (size_t j = 0; j < i; ++j) {
      if (slots[j] >= 0) drop_pin(static_cast<uint32_t>(slots[j]));
    }
    return false;
  }
  return true;
}

// Backwards, so that earlier rows end up more recent; links are fetched two steps ahead, because
// the neighbours are only known once a block's own links are here.
void BlockIndex::Core::touch_rows(std::span<const int64_t> slots) {
  constexpr size_t kOwnAhead = 16;
  constexpr size_t kNeighboursAhead = 8;
  for (size_t i = slots.size(); i-- > 0;) {
    if (i >= kOwnAhead && slots[i - kOwnAhead] >= 0) {
      __builtin_prefetch(&links[static_cast<size_t>(slots[i - kOwnAhead])], 1);
    }
    if (i >= kNeighboursAhead && slots[i - kNeighboursAhead] >= 0) {
      const Links& near = links[static_cast<size_t>(slots[i - kNeighboursAhead])];
      if (near.hotter != kNoSlot) __builtin_prefetch(&links[near.hotter], 1);
      if (near.colder != kNoSlot) __builtin_prefetch(&links[near.colder], 1);
    }
    if (slots[i] >= 0) touch(static_cast<uint32_t>(slots[i]));
  }
}

Status BlockIndex::Core::use_rows(std::span<const int64_t> slots, const ReadOptions& options) {
  if (options.is_pin && !pin_rows(slots)) {
    return {Code::kUsage, "a block has 65535 pins already: somebody does not unpin"};
  }
  if (options.is_touch) touch_rows(slots);
  return Status::Ok();
}

Status BlockIndex::match(std::span<const BlockKey> keys, const ReadOptions& options, Places places,
                         int64_t* count) {
  const Call call(*core_);
  Core::Probe ahead;
  size_t found = 0;
  bool is_missed = false;
  while (found < keys.size() && !is_missed) {
    const size_t base = found;
    const size_t rows = std::min(Core::kGroup, keys.size() - base);
    core_->probe(keys.subspan(base, rows), &ahead);
    for (size_t i = 0; i < rows && !is_missed; ++i) {
      const uint32_t slot =
          core_->find_visible(keys[base + i], ahead.hashes[i], ahead.guesses[i], options.now_ms);
      is_missed = slot == kNoSlot;
      if (!is_missed) core_->place(slot, places, found++);
    }
  }
  *count = 0;
  const Status status = core_->use_rows(places.slots.first(found), options);
  if (!status.ok()) return status;
  core_->stats.hits += static_cast<int64_t>(found);
  core_->stats.misses += static_cast<int64_t>(keys.size() - found);
  *count = static_cast<int64_t>(found);
  return Status::Ok();
}

Status BlockIndex::lookup(std::span<const BlockKey> keys, const ReadOptions& options,
                          std::span<uint8_t> is_found, Places places) {
  const Call call(*core_);
  Core::Probe ahead;
  int64_t found = 0;
  for (size_t base = 0; base < keys.size(); base += Core::kGroup) {
    const size_t rows = std::min(Core::kGroup, keys.size() - base);
    core_->probe(keys.subspan(base, rows), &ahead);
    for (size_t i = 0; i < rows; ++i) {
      const size_t row = base + i;
      const uint32_t slot =
          core_->find_visible(keys[row], ahead.hashes[i], ahead.guesses[i], options.now_ms);
      is_found[row] = slot != kNoSlot;
      if (slot != kNoSlot) {
        core_->place(slot, places, row);
        ++found;
        continue;
      }
      places.slots[row] = -1;
      places.generations[row] = 0;
      places.checksums[row] = 0;
    }
  }
  const Status status = core_->use_rows(places.slots.first(keys.size()), options);
  if (!status.ok()) return status;
  core_->stats.hits += found;
  core_->stats.misses += static_cast<int64_t>(keys.size()) - found;
  return Status::Ok();
}

void BlockIndex::match_many(std::span<const BlockKey> keys, std::span<const int64_t> lengths,
                            uint64_t now_ms, std::span<int64_t> counts) {
  const Call call(*core_);
  Core::Probe ahead;
  size_t start = 0;
  for (size_t j = 0; j < lengths.size(); ++j) {
    const auto length = static_cast<size_t>(lengths[j]);
    size_t found = 0;
    bool is_missed = false;
    while (found < length && !is_missed) {
      const size_t base = found;
      const size_t rows = std::min(Core::kGroup, length - base);
      core_->probe(keys.subspan(start + base, rows), &ahead);
      for (size_t i = 0; i < rows && !is_missed; ++i) {
        is_missed = core_->find_visible(keys[start + base + i], ahead.hashes[i], ahead.guesses[i],
                                        now_ms) == kNoSlot;
        if (!is_missed) ++found;
      }
    }
    counts[j] = static_cast<int64_t>(found);
    start += length;
  }
}

void BlockIndex::validate(std::span<const BlockKey> keys, References references,
                          std::span<uint8_t> is_live) {
  const Call call(*core_);
  for (size_t i = 0; i < keys.size(); ++i) {
    const uint32_t slot = core_->resolve(references.slots[i], references.generations[i]);
    is_live[i] = slot != kNoSlot && core_->is_readable(slot) && core_->blocks[slot].key == keys[i];
  }
}

void BlockIndex::inspect(std::span<const BlockKey> keys, uint64_t now_ms,
                         std::span<uint8_t> conditions) {
  const Call call(*core_);
  if (core_->blocks.size() == 0) {
    // There is no table yet to look into.
    std::fill(conditions.begin(), conditions.end(), static_cast<uint8_t>(KeyCondition::kAbsent));
    return;
  }
  for (size_t i = 0; i < keys.size(); ++i) {
    const uint32_t slot = core_->table.find(keys[i].hash(), keys[i]);
    KeyCondition condition = KeyCondition::kAbsent;
    if (slot != kNoSlot) {
      condition = core_->blocks[slot].state != SlotState::kCommitted ? KeyCondition::kWriting
                  : core_->is_expired(slot, now_ms)                  ? KeyCondition::kExpired
                                                                     : KeyCondition::kHeld;
    }
    conditions[i] = static_cast<uint8_t>(condition);
  }
}

}  // namespace kvx
