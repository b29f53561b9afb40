#include "kvx/job.h"

#include "engine_core.h"
#include "job_record.h"

namespace kvx {

namespace {

// Sleeps until `is_reached`. Whoever makes it true holds the job's mutex then, or takes it
// afterwards to notify: nobody who is about to sleep misses it.
template <typename Condition>
bool sleep_until(JobRecord& record, TimePoint until, Condition is_reached) {
  if (is_reached()) return true;
  std::unique_lock lock(record.mutex);
  return record.ended.wait_until(lock, until, is_reached);
}

}  // namespace

std::string_view job_state_name(JobState state) {
  constexpr std::string_view kNames[kJobStates] = {"running", "done", "failed", "timed_out",
                                                   "cancelled"};
  return kNames[static_cast<int>(state)];
}

uint64_t Job::id() const { return record_->id; }
JobKind Job::kind() const { return record_->batch.kind; }
JobState Job::state() const { return record_->state.load(std::memory_order_acquire); }
bool Job::is_at_rest() const { return is_terminal() && record_->planes_gate.is_at_rest(); }
bool Job::is_quiesced() const { return record_->is_quiesced.load(std::memory_order_acquire); }

bool Job::wait(double timeout_s) const {
  const TimePoint until = time_after(timeout_s);
  while (timeout_s > 0.0 && record_->core->help(*record_)) {
    if (Clock::now() >= until) break;
  }
  return sleep_until(*record_, until, [this] { return record_->is_terminal(); });
}

bool Job::wait_at_rest(double timeout_s) const {
  return sleep_until(*record_, time_after(timeout_s), [this] { return is_at_rest(); });
}

bool Job::wait_quiesced(double timeout_s) const {
  return sleep_until(*record_, time_after(timeout_s), [this] { return is_quiesced(); });
}

bool Job::cancel() const { return record_->core->end_early(*record_, JobState::kCancelled); }

int64_t Job::blocks() const { return record_->batch.blocks(); }
int64_t Job::bytes() const { return record_->total_bytes; }
int64_t Job::blocks_done() const { return record_->done().blocks; }
int64_t Job::bytes_done() const { return record_->done().bytes; }

int64_t Job::latency_ns() const {
  if (is_terminal()) return record_->latency_ns.load(std::memory_order_relaxed);
  return ns_between(record_->begun_at, Clock::now());
}

void Job::codes(std::span<int32_t> target) const {
  for (size_t i = 0; i < target.size(); ++i) {
    const int32_t code = record_->ledger.code(static_cast<int64_t>(i));
    target[i] = code < 0 ? kUndecided : code;
  }
}

void Job::errnos(std::span<int32_t> target) const {
  for (size_t i = 0; i < target.size(); ++i) {
    const auto block = static_cast<int64_t>(i);
    const auto code = static_cast<Code>(record_->ledger.code(block));
    const bool has_errno = code == Code::kStorage || code == Code::kDevice;
    target[i] = has_errno ? record_->ledger.error_number(block) : 0;
  }
}

void Job::checksums(std::span<uint64_t> target) const {
  for (size_t i = 0; i < target.size(); ++i) {
    const auto block = static_cast<int64_t>(i);
    const auto code = static_cast<Code>(record_->ledger.code(block));
    const bool has_sum = code == Code::kOk || code == Code::kCorrupt;
    target[i] = has_sum ? record_->ledger.checksum(block) : 0;
  }
}

Status Job::sync_status() const {
  const auto code = static_cast<Code>(record_->sync_code.load(std::memory_order_acquire));
  if (code == Code::kOk) return Status::Ok();
  return {code, "fdatasync failed", record_->sync_errno.load(std::memory_order_acquire)};
}

}  // namespace kvx
