// The eviction order of one index: per owner and level a list, coldest block first to go.
//
// It knows links and frequencies, not keys or states: BlockIndex decides what may be in the order
// (committed blocks), tells it what happens, and asks for the coldest. A level is 0 for kLru and
// kFifo, the frequency for kLfu, its bit width for kLfuWithRecency, the queue for kS3Fifo.
// Not thread-safe: under the lock of its index.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "eviction_ghost.h"
#include "eviction_list.h"
#include "eviction_tournament.h"
#include "kvx/eviction_policy.h"
#include "kvx/status.h"

namespace kvx {

inline constexpr int64_t kAnyOwner = -1;

class EvictionOrder {
 public:
  enum class End : uint8_t { kHot, kCold };

  explicit EvictionOrder(EvictionPolicy policy);

  // `links` moved or has another size; what is linked stays linked.
  Status attach(Links* links, size_t link_count);
  void grow_owners(size_t owners);

  // A block was committed: sets its frequency and links it at the hot end.
  void admit(uint32_t slot, uint64_t hash, bool is_dirty);
  // As admit, for a block that comes back with a history.
  void restore(uint32_t slot, uint8_t frequency);
  // REQUIRES: linked.
  void touch(uint32_t slot, bool is_dirty);
  // The touch of a block that is committed but not linked; false where touches mean nothing.
  bool touch_unlinked(uint32_t slot);
  void unlink(uint32_t slot);
  // Puts a block that is not linked at an end of its level. REQUIRES: frequency and mark are set.
  void link(uint32_t slot, End end, bool is_dirty);
  // The policy evicts `slot` (already unlinked): remembers it where the policy has ghosts.
  void remember_evicted(uint32_t slot, uint64_t hash);

  // The block the policy would evict, kNoSlot where nothing is linked. May turn queues over.
  uint32_t coldest(int64_t owner);
  // The next candidates after and including the coldest: a hint for prefetching.
  size_t peek(int64_t owner, std::span<uint32_t> slots) const;
  // Moves flush hands past clean blocks; returns the coldest block at a hand, or kNoSlot.
  // O(levels * owners) a call.
  template <typename IsDirty>
  uint32_t coldest_dirty(const IsDirty& is_dirty);
  // A block behind the hand is dirty again (its flush failed).
  void rewind_hand(uint32_t slot);

  [[nodiscard]] uint8_t frequency(uint32_t slot) const;
  [[nodiscard]] size_t level(uint32_t slot) const;
  [[nodiscard]] int64_t memory_bytes() const;
  // The first violated invariant, given how many blocks ought to be linked.
  Status check(int64_t linked) const;

 private:
  static constexpr size_t kLevelsMax = 256;
  static constexpr size_t kSmall = 0;
  static constexpr size_t kMain = 1;

  struct LevelSet {  // which levels hold a block
    std::array<uint64_t, kLevelsMax / 64> words{};
    void set(size_t level) { words[level / 64] |= uint64_t{1} << (level % 64); }
    void clear(size_t level) { words[level / 64] &= ~(uint64_t{1} << (level % 64)); }
    [[nodiscard]] size_t lowest() const;
  };

  SlotList& list(size_t owner, size_t level) { return lists_[owner * levels_ + level]; }
  const SlotList& list(size_t owner, size_t level) const { return lists_[owner * levels_ + level]; }
  uint64_t& size_of(size_t level) { return level_sizes_[level]; }

  void note_cold_end(size_t owner, size_t level);
  void count_access();
  void halve_frequencies();
  void settle_frequencies();
  void rebuild_levels();
  // kLevelsMax where the scope is empty.
  [[nodiscard]] size_t level_to_evict(int64_t owner) const;
  [[nodiscard]] uint32_t cold_end(int64_t owner, size_t level) const;

  const EvictionPolicy policy_;
  const size_t levels_;
  Links* links_ = nullptr;
  size_t link_count_ = 0;
  size_t owners_ = 0;
  uint64_t tick_ = 0;
  uint64_t accesses_ = 0;  // since frequencies were last halved
  uint8_t halvings_ = 0;   // modulo 256
  std::vector<SlotList> lists_;
  std::vector<LevelSet> owner_levels_;
  std::vector<OwnerTournament> tournaments_;  // one per level
  std::vector<uint64_t> level_sizes_;
  LevelSet filled_;
  GhostQueue ghosts_;
};

template <typename IsDirty>
uint32_t EvictionOrder::coldest_dirty(const IsDirty& is_dirty) {
  for (size_t level = 0; level < levels_; ++level) {
    uint32_t best = kNoSlot;
    for (size_t owner = 0; owner < owners_; ++owner) {
      SlotList& from = list(owner, level);
      while (from.hand != kNoSlot && !is_dirty(from.hand)) from.hand = links_[from.hand].hotter;
      if (from.hand == kNoSlot) continue;
      if (best == kNoSlot || links_[from.hand].tick < links_[best].tick) best = from.hand;
    }
    if (best != kNoSlot) return best;
  }
  return kNoSlot;
}

}  // namespace kvx
