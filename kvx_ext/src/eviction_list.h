// Where blocks stand in an eviction order: doubly linked lists threaded through one array.
//
// A list runs from its hot end to its cold end. Its flush hand points at the coldest block that may
// still be dirty: everything colder is known to be clean or being flushed, so finding the coldest
// dirty blocks again and again costs no walk over the clean ones.
#pragma once

#include <cstdint>

namespace kvx {

inline constexpr uint32_t kNoSlot = 0xFFFFFFFF;

// The links of one slot; also used by the list of free slots.
struct Links {
  uint32_t hotter;
  uint32_t colder;
  uint64_t tick;      // when it last moved to a hot end; orders blocks across owners
  uint32_t expiry_s;  // 0: never
  uint16_t owner;     // index into the owners, not the caller's number
  uint8_t frequency;  // of touches, as the policy counts them
  uint8_t mark;       // kLfuWithRecency: halvings at the last touch; kS3Fifo: which queue
};
static_assert(sizeof(Links) == 24);

struct SlotList {
  uint32_t hot = kNoSlot;
  uint32_t cold = kNoSlot;
  uint32_t hand = kNoSlot;  // kNoSlot: nothing in the list is dirty
  uint32_t size = 0;

  void push_hot(Links* links, uint32_t slot) {
    links[slot].hotter = kNoSlot;
    links[slot].colder = hot;
    (hot == kNoSlot ? cold : links[hot].hotter) = slot;
    hot = slot;
    ++size;
  }

  void push_cold(Links* links, uint32_t slot) {
    links[slot].colder = kNoSlot;
    links[slot].hotter = cold;
    (cold == kNoSlot ? hot : links[cold].colder) = slot;
    cold = slot;
    ++size;
  }

  void unlink(Links* links, uint32_t slot) {
    const uint32_t hotter = links[slot].hotter;
    const uint32_t colder = links[slot].colder;
    (hotter == kNoSlot ? hot : links[hotter].colder) = colder;
    (colder == kNoSlot ? cold : links[colder].hotter) = hotter;
    if (hand == slot) hand = hotter;
    --size;
  }

  // Puts the whole of `warmer` at the hot end and leaves it empty.
  void splice_hot(Links* links, SlotList& warmer) {
    if (warmer.size == 0) return;
    if (size == 0) {
      *this = warmer;
    } else {
      links[hot].hotter = warmer.cold;
      links[warmer.cold].colder = hot;
      hot = warmer.hot;
      if (hand == kNoSlot) hand = warmer.hand;
      size += warmer.size;
    }
    warmer = SlotList{};
  }
};

}  // namespace kvx
