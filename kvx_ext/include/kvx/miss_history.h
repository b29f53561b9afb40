// Why blocks left: a bounded memory of the last removals, so that a miss can be explained.
//
// It keeps a 28-bit fingerprint of the key and a reason, 4 bytes a removal, in sets of one cache
// line. A newer removal in a full set pushes out the oldest one of that set: reasons for the last
// capacity / 2 removals are right in more than 99% of cases. A key that never was here is taken for
// one that was with probability 16 / 2^28. Thread-safe; several indexes may share one.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>

#include "kvx/block_key.h"
#include "kvx/huge_array.h"
#include "kvx/status.h"

namespace kvx {

// At most 15; 0 is "no record". The values cross into Python and into metrics: append only.
enum class RemovalReason : uint8_t {
  kNeverStored = 0,  // nothing is remembered of this key
  kEvicted = 1,
  kExpired = 2,
  kDropped = 3,  // the caller asked
  kCorrupt = 4,  // the bytes failed their checksum
  kRetired = 5,  // its slot was taken out of the pool
  kCleared = 6,  // the whole index was emptied
  kFailed = 7,   // the write that should have filled it was aborted
  kReplaced = 8,
};
inline constexpr uint8_t kRemovalReasonMax = 15;

class MissHistory {
 public:
  struct Removal {
    uint64_t hash;  // BlockKey::hash()
    RemovalReason reason;
  };

  // Remembers about `capacity` removals (rounded up to whole sets). kCapacity without memory.
  static Status create(int64_t capacity, std::shared_ptr<MissHistory>* history);

  // Oldest first; the last one of a key counts.
  void record(std::span<const Removal> removals);
  // reasons[i] = why keys[i] left, as a RemovalReason. REQUIRES: equal sizes.
  void why(std::span<const BlockKey> keys, std::span<uint8_t> reasons) const;

  [[nodiscard]] int64_t capacity() const;
  [[nodiscard]] int64_t memory_bytes() const;

 private:
  static constexpr uint32_t kWays = 16;
  struct Set {
    uint32_t records[kWays];  // newest first: fingerprint << 4 | reason, 0 = none
  };

  MissHistory() = default;
  Set& set_of(uint64_t hash) const;

  mutable std::mutex mutex_;
  HugeArray<Set> sets_;
};

}  // namespace kvx
