// The handle of one transfer.
#include "agent/agent_core.h"
#include "agent/remote_job.h"

namespace kvx {

uint64_t RemoteJob::id() const { return record_->id; }
JobState RemoteJob::state() const { return record_->state.load(std::memory_order_acquire); }
bool RemoteJob::is_quiesced() const { return record_->is_quiesced.load(std::memory_order_acquire); }
bool RemoteJob::is_lost() const { return record_->is_lost.load(std::memory_order_acquire); }
bool RemoteJob::wait(double timeout_s) const { return core_->wait(*record_, timeout_s); }

bool RemoteJob::wait_quiesced(double timeout_s) const {
  std::unique_lock lock(record_->mutex);
  return record_->ended.wait_until(lock, time_after(timeout_s), [this] { return is_quiesced(); });
}

bool RemoteJob::cancel() const { return core_->cancel(*record_); }
bool RemoteJob::watch() const { return core_->watch(*record_); }

int64_t RemoteJob::blocks() const { return record_->ledger.blocks(); }
int64_t RemoteJob::bytes() const { return record_->plan->total_bytes; }

int64_t RemoteJob::blocks_done() const {
  int64_t done = 0;
  for (int64_t i = 0; i < blocks(); ++i) {
    done += record_->ledger.code(i) == static_cast<int32_t>(Code::kOk) ? 1 : 0;
  }
  return done;
}

int64_t RemoteJob::bytes_done() const {
  if (state() == JobState::kDone) return bytes();
  int64_t done = 0;
  for (int64_t i = 0; i < blocks(); ++i) {
    if (record_->ledger.code(i) == static_cast<int32_t>(Code::kOk)) done += record_->bytes_of(i);
  }
  return done;
}

int64_t RemoteJob::latency_ns() const {
  if (is_terminal()) return record_->latency_ns.load(std::memory_order_relaxed);
  return ns_between(record_->begun_at, Clock::now());
}

void RemoteJob::codes(std::span<int32_t> target) const {
  for (size_t i = 0; i < target.size(); ++i) {
    const int32_t code = record_->ledger.code(static_cast<int64_t>(i));
    target[i] = code < 0 ? kUndecided : code;
  }
}

void RemoteJob::errnos(std::span<int32_t> target) const {
  for (size_t i = 0; i < target.size(); ++i) {
    target[i] = record_->ledger.error_number(static_cast<int64_t>(i));
  }
}

void RemoteJob::checksums(std::span<uint64_t> target) const {
  for (size_t i = 0; i < target.size(); ++i) {
    target[i] = record_->ledger.checksum(static_cast<int64_t>(i));
  }
}

}  // namespace kvx
