#include "eviction.h"

#include <algorithm>
#include <string>

namespace kvx {

namespace {

constexpr uint64_t kAccessesPerSlot = 8;
constexpr uint8_t kS3FrequencyMax = 3;
constexpr uint8_t kFrequencyMax = 255;
// Frequencies have 8 bits: after so many halvings every one is 0. Settling long before `mark` wraps
// keeps the difference of two marks unambiguous.
constexpr uint8_t kHalvingsToZero = 8;
constexpr uint8_t kHalvingsToSettle = 64;

size_t levels_of(EvictionPolicy policy) {
  switch (policy) {
    case EvictionPolicy::kLfu:
      return 256;
    case EvictionPolicy::kLfuWithRecency:
      return 9;  // bit widths of 0 to 255
    case EvictionPolicy::kS3Fifo:
      return 2;
    case EvictionPolicy::kLru:
    case EvictionPolicy::kFifo:
      break;
  }
  return 1;
}

}  // namespace

size_t EvictionOrder::LevelSet::lowest() const {
  for (size_t i = 0; i < words.size(); ++i) {
    if (words[i] != 0) return i * 64 + static_cast<size_t>(std::countr_zero(words[i]));
  }
  return kLevelsMax;
}

EvictionOrder::EvictionOrder(EvictionPolicy policy) : policy_(policy), levels_(levels_of(policy)) {
  tournaments_.resize(levels_);
  level_sizes_.resize(levels_);
}

Status EvictionOrder::attach(Links* links, size_t link_count) {
  links_ = links;
  link_count_ = link_count;
  if (policy_ != EvictionPolicy::kS3Fifo) return Status::Ok();
  return ghosts_.reset(link_count / 4 * 3);
}

void EvictionOrder::grow_owners(size_t owners) {
  if (owners <= owners_) return;
  owners_ = owners;
  lists_.resize(owners * levels_);
  owner_levels_.resize(owners);
  for (OwnerTournament& tournament : tournaments_) tournament.grow(owners);
}

uint8_t EvictionOrder::frequency(uint32_t slot) const {
  const Links& at = links_[slot];
  if (policy_ != EvictionPolicy::kLfuWithRecency) return at.frequency;
  const auto halvings = static_cast<uint8_t>(halvings_ - at.mark);
  return static_cast<uint8_t>(at.frequency >> std::min(halvings, kHalvingsToZero));
}

size_t EvictionOrder::level(uint32_t slot) const {
  switch (policy_) {
    case EvictionPolicy::kLfu:
      return links_[slot].frequency;
    case EvictionPolicy::kLfuWithRecency:
      return static_cast<size_t>(std::bit_width(frequency(slot)));
    case EvictionPolicy::kS3Fifo:
      return links_[slot].mark;
    case EvictionPolicy::kLru:
    case EvictionPolicy::kFifo:
      break;
  }
  return 0;
}

void EvictionOrder::note_cold_end(size_t owner, size_t level) {
  const uint32_t cold = list(owner, level).cold;
  tournaments_[level].set(owner, cold == kNoSlot ? OwnerTournament::kAbsent : links_[cold].tick);
}

void EvictionOrder::link(uint32_t slot, End end, bool is_dirty) {
  const size_t owner = links_[slot].owner;
  const size_t at = level(slot);
  SlotList& target = list(owner, at);
  if (end == End::kHot) {
    links_[slot].tick = ++tick_;
    target.push_hot(links_, slot);
    if (is_dirty && target.hand == kNoSlot) target.hand = slot;
  } else {
    target.push_cold(links_, slot);
    if (is_dirty) target.hand = slot;
  }
  if (target.cold == slot) note_cold_end(owner, at);
  if (target.size == 1) owner_levels_[owner].set(at);
  if (++size_of(at) == 1) filled_.set(at);
}

void EvictionOrder::unlink(uint32_t slot) {
  const size_t owner = links_[slot].owner;
  const size_t at = level(slot);
  SlotList& source = list(owner, at);
  const bool was_cold_end = source.cold == slot;
  source.unlink(links_, slot);
  if (was_cold_end) note_cold_end(owner, at);
  if (source.size == 0) owner_levels_[owner].clear(at);
  if (--size_of(at) == 0) filled_.clear(at);
}

void EvictionOrder::count_access() {
  if (policy_ != EvictionPolicy::kLfuWithRecency) return;
  if (++accesses_ < kAccessesPerSlot * link_count_) return;
  accesses_ = 0;
  halve_frequencies();
}

void EvictionOrder::admit(uint32_t slot, uint64_t hash, bool is_dirty) {
  count_access();
  const bool is_s3 = policy_ == EvictionPolicy::kS3Fifo;
  links_[slot].frequency = is_s3 ? 0 : 1;
  links_[slot].mark = is_s3 ? static_cast<uint8_t>(ghosts_.take(hash) ? kMain : kSmall) : halvings_;
  link(slot, End::kHot, is_dirty);
}

void EvictionOrder::restore(uint32_t slot, uint8_t frequency) {
  const bool is_s3 = policy_ == EvictionPolicy::kS3Fifo;
  links_[slot].frequency = is_s3 ? std::min(frequency, kS3FrequencyMax) : frequency;
  links_[slot].mark = is_s3 ? static_cast<uint8_t>(frequency > 1 ? kMain : kSmall) : halvings_;
  link(slot, End::kHot, false);
}

void EvictionOrder::touch(uint32_t slot, bool is_dirty) {
  switch (policy_) {
    case EvictionPolicy::kFifo:
      return;
    case EvictionPolicy::kS3Fifo:
      touch_unlinked(slot);
      return;
    case EvictionPolicy::kLru:
    case EvictionPolicy::kLfu:
    case EvictionPolicy::kLfuWithRecency:
      break;
  }
  count_access();
  unlink(slot);
  const uint8_t before = frequency(slot);
  links_[slot].frequency = before == kFrequencyMax ? before : static_cast<uint8_t>(before + 1);
  links_[slot].mark = halvings_;
  link(slot, End::kHot, is_dirty);
}

bool EvictionOrder::touch_unlinked(uint32_t slot) {
  if (policy_ == EvictionPolicy::kFifo) return false;
  count_access();
  const bool is_s3 = policy_ == EvictionPolicy::kS3Fifo;
  const uint8_t limit = is_s3 ? kS3FrequencyMax : kFrequencyMax;
  const uint8_t before = frequency(slot);
  links_[slot].frequency = before >= limit ? limit : static_cast<uint8_t>(before + 1);
  if (!is_s3) links_[slot].mark = halvings_;
  return true;
}

void EvictionOrder::remember_evicted(uint32_t slot, uint64_t hash) {
  if (policy_ == EvictionPolicy::kS3Fifo && links_[slot].mark == kSmall) ghosts_.add(hash);
}

void EvictionOrder::rewind_hand(uint32_t slot) {
  SlotList& from = list(links_[slot].owner, level(slot));
  from.hand = from.cold;
}

void EvictionOrder::halve_frequencies() {
  ++halvings_;
  for (size_t owner = 0; owner < owners_; ++owner) {
    list(owner, 0).splice_hot(links_, list(owner, 1));
    for (size_t at = 1; at + 1 < levels_; ++at) std::swap(list(owner, at), list(owner, at + 1));
  }
  rebuild_levels();
  if (halvings_ % kHalvingsToSettle == 0) settle_frequencies();
}

void EvictionOrder::settle_frequencies() {
  for (uint32_t slot = 0; slot < link_count_; ++slot) {
    links_[slot].frequency = frequency(slot);
    links_[slot].mark = halvings_;
  }
}

void EvictionOrder::rebuild_levels() {
  filled_ = LevelSet{};
  for (LevelSet& levels : owner_levels_) levels = LevelSet{};
  for (size_t at = 0; at < levels_; ++at) {
    size_of(at) = 0;
    for (size_t owner = 0; owner < owners_; ++owner) {
      note_cold_end(owner, at);
      size_of(at) += list(owner, at).size;
      if (list(owner, at).size > 0) owner_levels_[owner].set(at);
    }
    if (size_of(at) > 0) filled_.set(at);
  }
}

int64_t EvictionOrder::memory_bytes() const {
  int64_t bytes = static_cast<int64_t>(lists_.capacity() * sizeof(SlotList) +
                                       owner_levels_.capacity() * sizeof(LevelSet) +
                                       level_sizes_.capacity() * sizeof(uint64_t));
  for (const OwnerTournament& tournament : tournaments_) bytes += tournament.memory_bytes();
  return bytes + ghosts_.memory_bytes();
}

}  // namespace kvx
