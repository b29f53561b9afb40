#include "agent/remote_job.h"

#include <algorithm>
#include <array>

#include "kvx/checksum.h"

namespace kvx {

namespace {

// What a copy thread takes at once; see job_record.cpp.
constexpr int64_t kGrainBytes = int64_t{1} << 20;
constexpr int64_t kGrainBlocksMax = 1024;

constexpr std::array<uint8_t, kKeyBytes> kNoKey{};

int64_t blocks_of(const RemotePlan& plan) { return static_cast<int64_t>(plan.local.size()); }

int64_t blocks_a_grain(const RemotePlan& plan) {
  const int64_t mean_bytes = plan.total_bytes / std::max<int64_t>(blocks_of(plan), 1);
  return std::clamp<int64_t>(kGrainBytes / std::max<int64_t>(mean_bytes, 1), 1, kGrainBlocksMax);
}

}  // namespace

RemoteRecord::RemoteRecord(uint64_t record_id, bool writes,
                           std::shared_ptr<const RemotePlan> its_plan, TimePoint its_deadline)
    : id(record_id),
      is_write(writes),
      plan(std::move(its_plan)),
      begun_at(Clock::now()),
      deadline(its_deadline),
      grain_blocks(blocks_a_grain(*plan)),
      ledger(blocks_of(*plan), 0) {}

bool RemoteRecord::take(int64_t* first, int64_t* count) {
  int64_t begin = cursor.load(std::memory_order_relaxed);
  while (begin < ledger.blocks()) {
    const int64_t wanted = std::min(grain_blocks, ledger.blocks() - begin);
    if (cursor.compare_exchange_weak(begin, begin + wanted, std::memory_order_relaxed)) {
      *first = begin;
      *count = wanted;
      return true;
    }
  }
  return false;
}

const uint8_t* RemoteRecord::key_of(int64_t block) const {
  if (plan->keys.empty()) return kNoKey.data();
  return plan->keys.data() + static_cast<size_t>(block) * kKeyBytes;
}

}  // namespace kvx
