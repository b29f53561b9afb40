// File stages: requests out, completions in. Completions arrive on the backend's thread, which must
// not be held up, so verifying and scattering is left to the copy threads.
#include <array>

#include "engine_core.h"

namespace kvx {

namespace {

// Requests handed to the backend at once; between two hand-overs a job that ended stops.
constexpr int64_t kSubmitBlocks = 64;

IoRequest request_for(JobRecord& job, int64_t block) {
  const auto i = static_cast<size_t>(block);
  const Batch& batch = job.batch;
  const bool is_read = batch.kind == JobKind::kRead;
  return {.kind = is_read ? IoKind::kRead : IoKind::kWrite,
          .fd = batch.fds[i],
          .buffer = reinterpret_cast<uint8_t*>(batch.addresses[i]),
          .bytes = is_read ? batch.io_bytes : batch.bytes[i],
          .offset = batch.offsets[i],
          .token = reinterpret_cast<uint64_t>(&job.slots[i])};
}

}  // namespace

void EngineCore::submit_io(JobRecord& job) {
  std::array<IoRequest, kSubmitBlocks> requests;
  const int64_t blocks = job.batch.blocks();
  for (int64_t first = 0; first < blocks && !job.is_ending(); first += kSubmitBlocks) {
    size_t count = 0;
    for (int64_t i = first; i < std::min(blocks, first + kSubmitBlocks); ++i) {
      if (!job.ledger.begin(i)) continue;
      requests[count++] = request_for(job, i);
      const auto index = static_cast<int32_t>(i);
      if (device_ != nullptr) note_slots(job, {&index, 1}, job.batch.kind == JobKind::kRead);
    }
    send(job, std::span(requests).first(count));
  }
}

// REQUIRES: the caller keeps the job alive.
void EngineCore::send(JobRecord& job, std::span<const IoRequest> requests) {
  const auto count = static_cast<int64_t>(requests.size());
  if (count == 0 || !job.ledger.try_hold(count)) return;
  for (const IoRequest& request : requests) {
    reinterpret_cast<IoSlot*>(request.token)->is_in_flight.store(true, std::memory_order_release);
  }
  counters_.on_io(count);
  backend_->submit(requests);
  // Who ended the job meanwhile may have cancelled what the backend had not seen yet.
  if (job.is_ending()) canceller_.cancel_requests(job.shared_from_this());
}

void EngineCore::submit_syncs(JobRecord& job) {
  std::vector<IoRequest> requests;
  const auto blocks = static_cast<size_t>(job.batch.blocks());
  for (size_t i = 0; i < job.batch.sync_fds.size(); ++i) {
    requests.push_back({.kind = IoKind::kSync,
                        .fd = job.batch.sync_fds[i],
                        .token = reinterpret_cast<uint64_t>(&job.slots[blocks + i])});
  }
  send(job, requests);
}

void EngineCore::on_completions(std::span<const IoCompletion> completions) {
  counters_.on_io(-static_cast<int64_t>(completions.size()));
  std::vector<int32_t> ready;
  size_t at = 0;
  while (at < completions.size()) {
    JobRecord& job = *reinterpret_cast<IoSlot*>(completions[at].token)->job;
    // The last hold may go below, and with it the table's reference.
    const std::shared_ptr<JobRecord> keep = job.shared_from_this();
    int64_t holds = 0;
    int64_t settled = 0;
    ready.clear();
    for (; at < completions.size(); ++at) {
      auto& slot = *reinterpret_cast<IoSlot*>(completions[at].token);
      if (slot.job != &job) break;
      slot.is_in_flight.store(false, std::memory_order_release);
      ++holds;
      if (job.is_ending()) counters_.on_late();
      bool is_ready = false;
      if (slot.index >= job.batch.blocks()) {
        settled += on_sync(job, slot.index - job.batch.blocks(), completions[at]);
      } else if (job.batch.kind == JobKind::kRead) {
        settled += on_read(job, slot.index, completions[at], &is_ready);
      } else {
        settled += on_write(job, slot.index, completions[at]);
      }
      if (is_ready) ready.push_back(slot.index);
    }
    // Before the copy threads hear of the blocks, so that the one who finishes the job finds no
    // hold of ours and announces both its ends at once.
    settle_balance(job, job.ledger.release(holds, settled));
    if (ready.empty() || job.is_ending()) continue;
    job.publish_ready(ready);
    pool_.offer(keep);
  }
}

int64_t EngineCore::settle_io(JobRecord& job, int64_t block, const IoCompletion& completion) {
  if (!job.ledger.settle(block, completion.code, completion.error_number, 0)) return 0;
  if (completion.code != Code::kOk) job.has_failed.store(true, std::memory_order_relaxed);
  return 1;
}

int64_t EngineCore::on_read(JobRecord& job, int64_t block, const IoCompletion& completion,
                            bool* is_ready) {
  *is_ready = completion.code == Code::kOk;
  if (*is_ready) return 0;
  const int64_t settled = settle_io(job, block, completion);
  if (job.batch.is_layered()) collect_verified(job, {}, 1);
  return settled;
}

int64_t EngineCore::on_write(JobRecord& job, int64_t block, const IoCompletion& completion) {
  const bool waits_for_sync =
      completion.code == Code::kOk && job.is_synced(job.batch.fds[static_cast<size_t>(block)]);
  const int64_t settled = waits_for_sync ? 0 : settle_io(job, block, completion);
  if (job.writes_left.fetch_sub(1, std::memory_order_acq_rel) == 1 && !job.is_ending()) {
    submit_syncs(job);
  }
  return settled;
}

// What was written and not synced is not stored: the blocks of a file share the fate of its sync.
int64_t EngineCore::on_sync(JobRecord& job, int64_t sync, const IoCompletion& completion) {
  const int32_t fd = job.batch.sync_fds[static_cast<size_t>(sync)];
  if (completion.code != Code::kOk) {
    int32_t none = 0;
    job.sync_errno.compare_exchange_strong(none, completion.error_number);
    none = 0;
    job.sync_code.compare_exchange_strong(none, static_cast<int32_t>(completion.code));
    job.has_failed.store(true, std::memory_order_relaxed);
  }
  int64_t settled = 1;
  for (int64_t i = 0; i < job.batch.blocks(); ++i) {
    if (job.batch.fds[static_cast<size_t>(i)] == fd && job.ledger.is_open(i)) {
      settled += settle_io(job, i, completion);
    }
  }
  return settled;
}

}  // namespace kvx
