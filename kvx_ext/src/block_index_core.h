// The inside of a BlockIndex: its arrays and the steps that keep them consistent.
//
// Every public call is a batch of these steps under the lock; no step leaves an invariant that
// check() names broken. Nothing here locks.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "block_index_entries.h"
#include "block_index_table.h"
#include "eviction.h"
#include "kvx/block_index.h"

namespace kvx {

class BlockIndex::Core {
 public:
  // Rows that are looked up together, so that their cache misses overlap.
  static constexpr size_t kGroup = 64;

  struct Owner {
    int32_t id = 0;
    int64_t used = 0;
    int64_t limit = -1;
  };
  struct Lease {
    uint64_t expires_ms = 0;
    std::vector<int64_t> slots;
    std::vector<uint32_t> generations;
  };
  struct Probe {
    uint64_t hashes[kGroup];
    uint32_t guesses[kGroup];  // where each key probably is, kNoSlot where it surely is not
  };

  Core(EvictionPolicy policy, std::shared_ptr<MissHistory> miss_history)
      : order(policy), history(std::move(miss_history)) {}

  // --- block_index_core.cpp: slots and owners ---
  Status resize(size_t slot_count);
  Status find_owner(int32_t id, uint16_t* owner);
  void make_free(uint32_t slot);
  uint32_t take_free();
  // A slot for `owner`, evicted if need be; kNoSlot, and why in `outcome`, when there is none.
  uint32_t take_slot(uint16_t owner, Removed* evicted, ReserveOutcome* outcome);
  bool evict_one(int64_t owner, Removed* evicted);
  // Ends the life of a reserved or committed block: cancelled or doomed if held, free otherwise.
  void detach(uint32_t slot, RemovalReason reason, Removed* removed);
  // A slot that nobody holds or writes any more becomes free.
  void finish(uint32_t slot);
  void admit(uint32_t slot, uint64_t hash);
  void forget_reservation(uint32_t slot);
  void flush_history();

  // --- block_index.cpp: one row, one batch of reserve() ---
  struct Reservations {
    std::span<uint8_t> outcomes;
    std::span<int64_t> slots;
    std::span<uint32_t> generations;
  };
  ReserveOutcome reserve_one(const BlockKey& key, uint64_t hash, const WriteOptions& options,
                             uint16_t owner, uint32_t* slot, Removed* evicted);
  void reserve(std::span<const BlockKey> keys, const WriteOptions& options, uint16_t owner,
               const Reservations& rows, Removed* evicted);
  bool restore_one(const RestoredBlocks& from, size_t row, uint16_t owner);

  // --- block_index_read.cpp: rows of slots, -1 to skip ---
  bool pin_rows(std::span<const int64_t> slots);
  void touch_rows(std::span<const int64_t> slots);
  Status use_rows(std::span<const int64_t> slots, const ReadOptions& options);

  // --- block_index_core_hold.cpp: what keeps a block from being evicted ---
  bool add_pin(uint32_t slot);
  void drop_pin(uint32_t slot);
  void clean(uint32_t slot);
  void undo_flush(uint32_t slot);
  void park(uint32_t slot);
  void unpark_if_free(uint32_t slot);
  void touch(uint32_t slot);
  void drop_lease(std::map<int64_t, Lease>::iterator lease);

  // --- block_index_core.cpp: looking up ---
  // Two passes of prefetches; REQUIRES: at most kGroup keys.
  void probe(std::span<const BlockKey> keys, Probe* probe) const;
  // The same for what the next `count` allocations will touch.
  void prefetch_allocations(uint16_t owner, size_t count) const;

  // --- block_index_check.cpp ---
  Status check() const;
  [[nodiscard]] int64_t memory_bytes() const;

  [[nodiscard]] bool is_expired(uint32_t slot, uint64_t now_ms) const {
    return blocks[slot].has(kExpires) && uint64_t{links[slot].expiry_s} * 1000 <= now_ms;
  }

  // The slot a key may be read from, or kNoSlot.
  [[nodiscard]] uint32_t find_visible(const BlockKey& key, uint64_t hash, uint32_t guess,
                                      uint64_t now_ms) const {
    if (guess == kNoSlot) return kNoSlot;
    const uint32_t slot = blocks[guess].key == key ? guess : table.find(hash, key);
    if (slot == kNoSlot || blocks[slot].state != SlotState::kCommitted) return kNoSlot;
    return is_expired(slot, now_ms) ? kNoSlot : slot;
  }

  // The slot a reference names if it still is that life of the slot, else kNoSlot.
  [[nodiscard]] uint32_t resolve(int64_t slot, uint32_t generation) const {
    if (slot < 0 || static_cast<size_t>(slot) >= blocks.size()) return kNoSlot;
    const Block& block = blocks[static_cast<size_t>(slot)];
    if (block.state <= SlotState::kFree || block.generation != generation) return kNoSlot;
    return static_cast<uint32_t>(slot);
  }

  [[nodiscard]] bool is_readable(uint32_t slot) const {
    const SlotState state = blocks[slot].state;
    return state == SlotState::kCommitted || state == SlotState::kDoomed;
  }

  void place(uint32_t slot, const Places& places, size_t row) const {
    places.slots[row] = slot;
    places.generations[row] = blocks[slot].generation;
    places.checksums[row] = blocks[slot].checksum;
  }

  std::mutex mutex;
  HugeArray<Block> blocks;
  HugeArray<Links> links;
  KeyTable table;
  EvictionOrder order;
  SlotList free;
  SlotList parked_dirty;  // parked blocks that need a flush, the coldest at the cold end
  std::vector<Owner> owners;
  std::unordered_map<int32_t, uint16_t> owner_of_id;
  std::map<int64_t, Lease> leases;
  std::set<std::pair<uint64_t, int64_t>> leases_due;  // (expires_ms, id)
  int64_t next_lease = 1;
  size_t sweep_at = 0;
  IndexStats stats;
  std::shared_ptr<MissHistory> history;
  std::vector<MissHistory::Removal> removals;  // of this call, not yet in the history
};

// Holds the lock for one public call and hands its removals to the history at the end.
class BlockIndex::Call {
 public:
  explicit Call(Core& core) : core_(core), lock_(core.mutex) {}
  ~Call() { core_.flush_history(); }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

 private:
  Core& core_;
  std::lock_guard<std::mutex> lock_;
};

}  // namespace kvx
