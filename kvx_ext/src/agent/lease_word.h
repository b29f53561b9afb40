// How a lease's entry of the shared page is written and read, by its owner and by others.
//
// It is a seqlock whose payload is the leased memory: the owner clears the generation before the
// memory changes, a reader looks at the generation again after it has copied.
#pragma once

#include <cstdint>

#include "clock.h"
#include "kvx/lease_table.h"
#include "shim/fence.h"

namespace kvx {

inline constexpr int64_t kLeasePageBytes = int64_t{kLeaseSlots} * sizeof(LeaseWord);

// steady_clock is CLOCK_MONOTONIC, which all processes of a host share. One in a time namespace of
// its own misjudges expiry alone: an owner clears the word before it reuses memory in any case.
inline int64_t lease_now_ns() { return ns_between(TimePoint{}, Clock::now()); }

inline void publish_word(LeaseWord& word, uint64_t generation, int64_t expires_ns) {
  // Release: whoever sees this expiry also sees that the generation before it was cleared.
  word.expires_ns.store(expires_ns, std::memory_order_release);
  word.generation.store(generation, std::memory_order_release);
}

inline void clear_word(LeaseWord& word) {
  word.generation.store(0, std::memory_order_relaxed);
  // Nothing the owner writes from now on may be seen before this. A release fence would order
  // ordinary stores only; on x86 a streaming store may overtake the one above.
  fence_all();
}

// REQUIRES: generation is not 0.
inline bool is_word_live(const LeaseWord& word, uint64_t generation) {
  if (word.generation.load(std::memory_order_acquire) != generation) return false;
  const int64_t expires_ns = word.expires_ns.load(std::memory_order_acquire);
  // The expiry read may be that of a lease which took the slot meanwhile.
  if (word.generation.load(std::memory_order_relaxed) != generation) return false;
  return lease_now_ns() < expires_ns;
}

}  // namespace kvx
