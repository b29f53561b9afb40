// Choosing a victim, and checking that the order is what it claims to be.
#include <algorithm>
#include <string>

#include "eviction.h"

namespace kvx {

size_t EvictionOrder::level_to_evict(int64_t owner) const {
  const auto of_owner = static_cast<size_t>(owner);
  if (policy_ != EvictionPolicy::kS3Fifo) {
    return owner == kAnyOwner ? filled_.lowest() : owner_levels_[of_owner].lowest();
  }
  const uint64_t small = owner == kAnyOwner ? level_sizes_[kSmall] : list(of_owner, kSmall).size;
  const uint64_t main = owner == kAnyOwner ? level_sizes_[kMain] : list(of_owner, kMain).size;
  if (small + main == 0) return kLevelsMax;
  // A tenth of what this scope holds; for the whole pool in steady state that is a tenth of it.
  const bool is_small_due = small * 10 >= small + main;
  return main == 0 || (small > 0 && is_small_due) ? kSmall : kMain;
}

uint32_t EvictionOrder::cold_end(int64_t owner, size_t level) const {
  const size_t from =
      owner == kAnyOwner ? tournaments_[level].winner() : static_cast<size_t>(owner);
  return list(from, level).cold;
}

uint32_t EvictionOrder::coldest(int64_t owner) {
  for (;;) {
    const size_t from = level_to_evict(owner);
    if (from == kLevelsMax) return kNoSlot;
    const uint32_t slot = cold_end(owner, from);
    if (policy_ != EvictionPolicy::kS3Fifo) return slot;
    Links& at = links_[slot];
    const bool is_promoted = from == kSmall && at.frequency > 1;
    const bool is_kept = from == kMain && at.frequency > 0;
    if (!is_promoted && !is_kept) return slot;
    // A dirty block is never colder than its list's hand, so at the cold end it is at the hand.
    const bool may_be_dirty = list(at.owner, from).hand == slot;
    unlink(slot);
    at.frequency = is_promoted ? 0 : static_cast<uint8_t>(at.frequency - 1);
    at.mark = static_cast<uint8_t>(kMain);
    link(slot, End::kHot, may_be_dirty);
  }
}

size_t EvictionOrder::peek(int64_t owner, std::span<uint32_t> slots) const {
  const size_t from = level_to_evict(owner);
  if (from == kLevelsMax) return 0;
  size_t count = 0;
  for (uint32_t slot = cold_end(owner, from); slot != kNoSlot && count < slots.size();
       slot = links_[slot].hotter) {
    slots[count++] = slot;
  }
  return count;
}

Status EvictionOrder::check(int64_t linked) const {
  auto broken = [](const std::string& what) { return Status{Code::kCorrupt, what}; };
  int64_t seen = 0;
  for (size_t at = 0; at < levels_; ++at) {
    uint64_t in_level = 0;
    uint64_t least = OwnerTournament::kAbsent;
    for (size_t owner = 0; owner < owners_; ++owner) {
      const SlotList& one = list(owner, at);
      uint32_t colder = kNoSlot;
      uint32_t count = 0;
      bool is_hand_seen = one.hand == kNoSlot;
      for (uint32_t slot = one.cold; slot != kNoSlot; slot = links_[slot].hotter) {
        if (++count > one.size) return broken("a list is longer than its size");
        if (links_[slot].colder != colder) return broken("a list's links disagree");
        if (links_[slot].owner != owner || level(slot) != at) return broken("in a wrong list");
        is_hand_seen |= slot == one.hand;
        colder = slot;
      }
      if (one.hot != colder || count != one.size) return broken("a list's end or size is wrong");
      if (!is_hand_seen) return broken("a flush hand points outside its list");
      if (one.size > 0) least = std::min(least, links_[one.cold].tick);
      if (one.size > 0 && owner_levels_[owner].lowest() > at) return broken("an owner's level set");
      in_level += count;
    }
    if (in_level != level_sizes_[at]) return broken("the size of a level is wrong");
    const bool is_empty = tournaments_[at].is_empty();
    if (is_empty != (in_level == 0)) return broken("a tournament is empty and its level is not");
    if (!is_empty && links_[cold_end(kAnyOwner, at)].tick != least) {
      return broken("a tournament's winner is not the coldest");
    }
    if (in_level > 0 && filled_.lowest() > at) return broken("the set of filled levels");
    seen += static_cast<int64_t>(in_level);
  }
  if (seen != linked) {
    return broken(std::to_string(seen) + " blocks linked, not " + std::to_string(linked));
  }
  return Status::Ok();
}

}  // namespace kvx
