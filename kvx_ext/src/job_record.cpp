#include "job_record.h"

#include <algorithm>

namespace kvx {

namespace {

// What a worker takes at once: long enough that taking it costs nothing (60 us at 17 GB/s), short
// enough that jobs share the workers fairly and notice soon that they have ended.
constexpr int64_t kGrainBytes = int64_t{1} << 20;
constexpr int64_t kGrainBlocksMax = 1024;

int64_t sum_bytes(const Batch& batch) {
  if (batch.kind != JobKind::kWrite) return batch.block_bytes * batch.blocks();
  int64_t total = 0;
  for (const int64_t bytes : batch.bytes) total += bytes;
  return total;
}

int64_t blocks_a_grain(const Batch& batch) {
  return std::clamp<int64_t>(kGrainBytes / std::max<int64_t>(batch.block_bytes, 1), 1,
                             kGrainBlocksMax);
}

}  // namespace

JobRecord::JobRecord(uint64_t job_id, Batch job_batch, TimePoint job_deadline)
    : id(job_id),
      batch(std::move(job_batch)),
      begun_at(Clock::now()),
      deadline(job_deadline),
      total_bytes(sum_bytes(batch)),
      grain_blocks(blocks_a_grain(batch)),
      ledger(batch.blocks(), static_cast<int64_t>(batch.sync_fds.size())),
      unverified(batch.blocks()),
      slots(batch.is_io() ? static_cast<size_t>(batch.blocks()) + batch.sync_fds.size() : 0) {
  if (batch.is_begun_elsewhere()) order.resize(static_cast<size_t>(batch.blocks()));
  for (size_t i = 0; i < slots.size(); ++i) {
    slots[i].job = this;
    slots[i].index = static_cast<int32_t>(i);
  }
  writes_left.store(batch.blocks(), std::memory_order_relaxed);
  synced_fds = batch.sync_fds;
  std::sort(synced_fds.begin(), synced_fds.end());
}

void JobRecord::publish_ready(const std::vector<int32_t>& ready) {
  std::lock_guard lock(order_mutex);
  int64_t end = ready_end.load(std::memory_order_relaxed);
  for (const int32_t block : ready) order[static_cast<size_t>(end++)] = block;
  ready_end.store(end, std::memory_order_release);
}

int64_t JobRecord::ready_grains() const {
  const int64_t left =
      ready_end.load(std::memory_order_acquire) - cursor.load(std::memory_order_relaxed);
  return left <= 0 ? 0 : (left + grain_blocks - 1) / grain_blocks;
}

bool JobRecord::take(Grain* grain) {
  int64_t first = cursor.load(std::memory_order_relaxed);
  for (;;) {
    const int64_t end = ready_end.load(std::memory_order_acquire);
    if (first >= end) return false;
    const int64_t count = std::min(grain_blocks, end - first);
    if (cursor.compare_exchange_weak(first, first + count, std::memory_order_relaxed)) {
      *grain = {first, count};
      return true;
    }
  }
}

Totals JobRecord::done() const {
  if (state.load(std::memory_order_acquire) == JobState::kDone) {
    return {batch.blocks(), total_bytes};
  }
  Totals totals;
  for (int64_t i = 0; i < batch.blocks(); ++i) {
    if (ledger.code(i) != static_cast<int32_t>(Code::kOk)) continue;
    ++totals.blocks;
    totals.bytes += batch.bytes_of(i);
  }
  return totals;
}

bool JobRecord::is_synced(int32_t fd) const {
  return std::binary_search(synced_fds.begin(), synced_fds.end(), fd);
}

}  // namespace kvx
