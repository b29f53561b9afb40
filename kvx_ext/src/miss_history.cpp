#include "kvx/miss_history.h"

#include <algorithm>
#include <string>

namespace kvx {

namespace {

constexpr uint32_t kReasonBits = 4;

uint32_t fingerprint(uint64_t hash) { return static_cast<uint32_t>(hash) << kReasonBits; }

}  // namespace

Status MissHistory::create(int64_t capacity, std::shared_ptr<MissHistory>* history) {
  if (capacity <= 0 || capacity > int64_t{1} << 34) {
    return {Code::kUsage,
            "a miss history remembers 1 to 2^34 removals, not " + std::to_string(capacity)};
  }
  std::shared_ptr<MissHistory> made(new MissHistory());
  const Status status = made->sets_.resize((static_cast<size_t>(capacity) + kWays - 1) / kWays);
  if (!status.ok()) return status;
  *history = std::move(made);
  return Status::Ok();
}

MissHistory::Set& MissHistory::set_of(uint64_t hash) const {
  return sets_[((hash >> 32) * sets_.size()) >> 32];
}

void MissHistory::record(std::span<const Removal> removals) {
  constexpr size_t kAhead = 8;
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < removals.size(); ++i) {
    if (i + kAhead < removals.size()) {
      __builtin_prefetch(&set_of(removals[i + kAhead].hash), 1);
    }
    uint32_t* records = set_of(removals[i].hash).records;
    const uint32_t mark = fingerprint(removals[i].hash);
    // The new record moves to the front over its own older copy, else over the set's oldest one.
    uint32_t at = 0;
    while (at < kWays - 1 && (records[at] >> kReasonBits) != (mark >> kReasonBits)) ++at;
    std::copy_backward(records, records + at, records + at + 1);
    records[0] = mark | static_cast<uint32_t>(removals[i].reason);
  }
}

void MissHistory::why(std::span<const BlockKey> keys, std::span<uint8_t> reasons) const {
  constexpr uint32_t kReasonMask = (1U << kReasonBits) - 1;
  const std::lock_guard lock(mutex_);
  for (size_t i = 0; i < keys.size(); ++i) {
    const uint64_t hash = keys[i].hash();
    const uint32_t mark = fingerprint(hash);
    reasons[i] = 0;
    for (const uint32_t record : set_of(hash).records) {
      if ((record & ~kReasonMask) != mark || (record & kReasonMask) == 0) continue;
      reasons[i] = static_cast<uint8_t>(record & kReasonMask);
      break;
    }
  }
}

int64_t MissHistory::capacity() const { return static_cast<int64_t>(sets_.size()) * kWays; }

int64_t MissHistory::memory_bytes() const {
  return sets_.memory_bytes() + static_cast<int64_t>(sizeof(*this));
}

}  // namespace kvx
