// The hash map of a BlockIndex: 4-byte buckets that name slots, Robin Hood order, no tombstones.
//
// A bucket is tag | distance | slot: as many bits for the slot as the pool needs, 4 for the
// distance from home (15: that or more), the rest a tag of the hash. Distance and tag together
// decide nearly every probe without looking at the block, and deletion shifts the rest of the run
// back without recomputing hashes. 1.6 buckets a slot; fastrange, so no power of two is wasted.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>

#include "block_index_entries.h"
#include "kvx/huge_array.h"
#include "kvx/status.h"

namespace kvx {

class KeyTable {
 public:
  // Makes room for blocks in slots below `slot_count`. REQUIRES: a new table; `blocks` outlives it.
  Status create(const Block* blocks, size_t slot_count) {
    const Status sized = buckets_.resize(slot_count * 8 / 5 + 2);
    if (!sized.ok()) return sized;
    std::fill_n(buckets_.data(), buckets_.size(), kEmpty);
    blocks_ = blocks;
    // One more than the largest slot, so that no real bucket has all its bits set.
    slot_bits_ = static_cast<uint32_t>(std::bit_width(slot_count));
    slot_mask_ = (uint32_t{1} << slot_bits_) - 1;
    tag_mask_ = (uint32_t{1} << (32 - kDistanceBits - slot_bits_)) - 1;
    return Status::Ok();
  }

  void swap(KeyTable& other) noexcept {
    buckets_.swap(other.buckets_);
    std::swap(blocks_, other.blocks_);
    std::swap(slot_bits_, other.slot_bits_);
    std::swap(slot_mask_, other.slot_mask_);
    std::swap(tag_mask_, other.tag_mask_);
  }

  void prefetch(uint64_t hash) const { __builtin_prefetch(&buckets_[home(hash)]); }

  // The first slot that tag and distance speak for: find() gives this one or a later one, and
  // nothing where this gives nothing.
  [[nodiscard]] uint32_t guess(uint64_t hash) const {
    uint32_t found = kNoSlot;
    probe(hash, [&](uint32_t slot) {
      found = slot;
      return true;
    });
    return found;
  }

  [[nodiscard]] uint32_t find(uint64_t hash, const BlockKey& key) const {
    uint32_t found = kNoSlot;
    probe(hash, [&](uint32_t slot) {
      if (!(blocks_[slot].key == key)) return false;
      found = slot;
      return true;
    });
    return found;
  }

  // REQUIRES: its key is not in the table, and there is room.
  void insert(uint64_t hash, uint32_t slot) {
    size_t at = home(hash);
    uint32_t bits = tag(hash) << kDistanceBits << slot_bits_ | slot;
    for (uint32_t distance = 0;; ++distance, at = next(at)) {
      const uint32_t bucket = buckets_[at];
      if (bucket == kEmpty) {
        buckets_[at] = with_distance(bits, distance);
        return;
      }
      const uint32_t theirs = true_distance(at);
      if (theirs >= distance) continue;
      buckets_[at] = with_distance(bits, distance);
      bits = bucket;
      distance = theirs;
    }
  }

  // REQUIRES: `slot` is in the table under `hash`.
  void erase(uint64_t hash, uint32_t slot) {
    size_t at = home(hash);
    while ((buckets_[at] & slot_mask_) != slot) at = next(at);
    for (size_t after = next(at);; at = after, after = next(after)) {
      const uint32_t bucket = buckets_[after];
      if (bucket == kEmpty || distance_of(bucket) == 0) break;
      buckets_[at] = with_distance(bucket, true_distance(after) - 1);
    }
    buckets_[at] = kEmpty;
  }

  [[nodiscard]] int64_t memory_bytes() const { return buckets_.memory_bytes(); }
  // How many buckets are filled, and whether each is where find() looks for it.
  [[nodiscard]] int64_t check() const {
    int64_t filled = 0;
    for (size_t at = 0; at < buckets_.size(); ++at) {
      if (buckets_[at] == kEmpty) continue;
      const uint32_t slot = buckets_[at] & slot_mask_;
      const uint64_t hash = blocks_[slot].key.hash();
      if (find(hash, blocks_[slot].key) != slot) return -1;
      ++filled;
    }
    return filled;
  }

 private:
  static constexpr uint32_t kEmpty = 0xFFFFFFFF;
  static constexpr uint32_t kDistanceBits = 4;
  static constexpr uint32_t kDistanceMax = 15;

  [[nodiscard]] size_t home(uint64_t hash) const { return ((hash >> 32) * buckets_.size()) >> 32; }
  [[nodiscard]] size_t next(size_t at) const { return at + 1 == buckets_.size() ? 0 : at + 1; }
  [[nodiscard]] uint32_t tag(uint64_t hash) const {
    return static_cast<uint32_t>(hash) & tag_mask_;
  }

  [[nodiscard]] uint32_t distance_of(uint32_t bucket) const {
    return bucket >> slot_bits_ & kDistanceMax;
  }

  [[nodiscard]] uint32_t with_distance(uint32_t bucket, uint32_t distance) const {
    const uint32_t cleared = bucket & ~(kDistanceMax << slot_bits_);
    return cleared | std::min(distance, kDistanceMax) << slot_bits_;
  }

  // Long runs are rare at this load; only they pay for a look at the block.
  [[nodiscard]] uint32_t true_distance(size_t at) const {
    const uint32_t stored = distance_of(buckets_[at]);
    if (stored < kDistanceMax) return stored;
    const size_t from = home(blocks_[buckets_[at] & slot_mask_].key.hash());
    return static_cast<uint32_t>(at >= from ? at - from : at + buckets_.size() - from);
  }

  template <typename Visit>
  void probe(uint64_t hash, const Visit& visit) const {
    const uint32_t mark = tag(hash) << kDistanceBits;
    size_t at = home(hash);
    for (uint32_t distance = 0;; ++distance, at = next(at)) {
      const uint32_t bucket = buckets_[at];
      const uint32_t expected = std::min(distance, kDistanceMax);
      if (bucket == kEmpty || distance_of(bucket) < expected) return;
      if (bucket >> slot_bits_ == (mark | expected) && visit(bucket & slot_mask_)) return;
    }
  }

  HugeArray<uint32_t> buckets_;
  const Block* blocks_ = nullptr;
  uint32_t slot_bits_ = 0;
  uint32_t slot_mask_ = 0;
  uint32_t tag_mask_ = 0;
};

}  // namespace kvx
