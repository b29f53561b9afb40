// What a BlockIndex keeps per slot: the block's identity here, its place in the order in Links.
//
// Two arrays rather than one: a match reads only the identity, half a cache line that never
// straddles two, and list operations on neighbours read only links.
#pragma once

#include <cstdint>

#include "eviction_list.h"
#include "kvx/block_key.h"

namespace kvx {

enum class SlotState : uint8_t {
  kAbsent = 0,  // not in the pool
  kFree,
  kReserved,
  kCancelled,  // its key was removed while it was being written
  kCommitted,
  kDoomed,  // removed while pinned
};

// Flags of a block.
inline constexpr uint8_t kDirty = 1;
inline constexpr uint8_t kFlushing = 2;  // handed out by take_dirty
// Committed, but not in the eviction order: its turn came while it was pinned or dirty.
inline constexpr uint8_t kParked = 4;
inline constexpr uint8_t kTouchedParked = 8;
inline constexpr uint8_t kExpires = 16;  // so that a match need not look at the links

struct Block {
  BlockKey key;
  uint64_t checksum;
  uint32_t generation;
  uint16_t pins;
  SlotState state;
  uint8_t flags;

  [[nodiscard]] bool has(uint8_t flag) const { return (flags & flag) != 0; }
  // In the hash map.
  [[nodiscard]] bool is_named() const {
    return state == SlotState::kReserved || state == SlotState::kCommitted;
  }
  // Dirty, and nobody is flushing it.
  [[nodiscard]] bool needs_flush() const { return (flags & (kDirty | kFlushing)) == kDirty; }
  [[nodiscard]] bool may_be_evicted() const { return pins == 0 && !has(kDirty); }
};
static_assert(sizeof(Block) == 32);

}  // namespace kvx
