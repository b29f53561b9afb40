// Transfers end: by their last block, their deadline, a cancel, a peer that is lost, or close().
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>

#include "agent/agent_core.h"

namespace kvx {

Status AgentCore::enter(const std::shared_ptr<RemoteRecord>& record) {
  bool is_sooner;
  {
    std::lock_guard lock(records_mutex_);
    if (is_closed()) return {Code::kCancelled, "the agent is closed"};
    records_.emplace(record->id, record);
    deadlines_.emplace(record->deadline, record->id);
    is_sooner = record->deadline < deadline_alarm_;
    if (is_sooner) deadline_alarm_ = record->deadline;
  }
  if (!record->is_served) counters_.running.fetch_add(1, std::memory_order_relaxed);
  if (is_sooner) loops_.front()->call_at(record->deadline, [this] { expire(); });
  return Status::Ok();
}

void AgentCore::expire() {
  std::vector<std::shared_ptr<RemoteRecord>> expired;
  TimePoint next = TimePoint::max();
  {
    std::lock_guard lock(records_mutex_);
    const TimePoint now = Clock::now();
    while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
      const auto found = records_.find(deadlines_.begin()->second);
      if (found != records_.end()) expired.push_back(found->second);
      deadlines_.erase(deadlines_.begin());
    }
    if (!deadlines_.empty()) next = deadlines_.begin()->first;
    deadline_alarm_ = next;
  }
  if (next != TimePoint::max()) loops_.front()->call_at(next, [this] { expire(); });
  for (const auto& record : expired) end_early(*record, JobState::kTimedOut, Code::kTimeout);
}

bool AgentCore::finish(RemoteRecord& record, int64_t holds, int64_t settled) {
  const Balance balance = record.ledger.release(holds, settled);
  if (balance.open == 0 && !record.is_claimed.exchange(true, std::memory_order_acq_rel)) {
    const JobState failed = record.is_cancelled.load() ? JobState::kCancelled : JobState::kFailed;
    end(record, record.has_failed.load(std::memory_order_relaxed) ? failed : JobState::kDone);
    return true;
  }
  if (balance.holds == 0) {
    quiesce(record);
    return true;
  }
  return false;
}

// REQUIRES: the caller claimed the record, and keeps it alive.
void AgentCore::end(RemoteRecord& record, JobState state) {
  record.latency_ns.store(ns_between(record.begun_at, Clock::now()), std::memory_order_relaxed);
  count_end(record, state);
  std::lock_guard lock(record.mutex);
  const bool is_quiet = record.ledger.release(1, 0).holds == 0;
  {
    std::lock_guard table(records_mutex_);
    deadlines_.erase({record.deadline, record.id});
    if (is_quiet) records_.erase(record.id);
    if (records_.empty()) records_emptied_.notify_all();
  }
  if (!is_quiet && !record.is_served) {
    record.was_quarantined = true;
    counters_.quarantined.fetch_add(1, std::memory_order_relaxed);
    counters_.quarantined_bytes.fetch_add(record.plan->total_bytes, std::memory_order_relaxed);
  }
  record.state.store(state, std::memory_order_release);
  record.is_quiesced.store(is_quiet, std::memory_order_release);
  record.ended.notify_all();
  if (record.waker >= 0) {
    const uint64_t one = 1;
    (void)!write(record.waker, &one, sizeof(one));
  }
  if (record.is_watched.load()) {
    events_.push({.kind = EventKind::kEnded, .peer = record.peer, .id = record.id});
  }
}

void AgentCore::quiesce(RemoteRecord& record) {
  std::lock_guard lock(record.mutex);
  {
    std::lock_guard table(records_mutex_);
    records_.erase(record.id);
    if (records_.empty()) records_emptied_.notify_all();
  }
  if (record.was_quarantined) {
    counters_.quarantined.fetch_sub(1, std::memory_order_relaxed);
    counters_.quarantined_bytes.fetch_sub(record.plan->total_bytes, std::memory_order_relaxed);
  }
  record.is_quiesced.store(true, std::memory_order_release);
  record.ended.notify_all();
  if (record.was_quarantined && record.is_watched.load()) {
    events_.push({.kind = EventKind::kQuiet, .peer = record.peer, .id = record.id});
  }
}

void AgentCore::count_end(const RemoteRecord& record, JobState state) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < record.ledger.blocks(); ++i) {
    const auto code = static_cast<Code>(record.ledger.code(i));
    if (code == Code::kOk) bytes += record.bytes_of(i);
    if (code == Code::kCorrupt) counters_.corrupt_blocks.fetch_add(1, std::memory_order_relaxed);
    if (code == Code::kStale) counters_.stale_blocks.fetch_add(1, std::memory_order_relaxed);
  }
  if (record.is_served) return;
  counters_.running.fetch_sub(1, std::memory_order_relaxed);
  (record.is_write ? counters_.writes : counters_.reads).fetch_add(1, std::memory_order_relaxed);
  auto& total = record.is_write ? counters_.bytes_written : counters_.bytes_read;
  total.fetch_add(bytes, std::memory_order_relaxed);
  if (state == JobState::kFailed) counters_.failed.fetch_add(1, std::memory_order_relaxed);
  if (state == JobState::kTimedOut) counters_.timed_out.fetch_add(1, std::memory_order_relaxed);
  if (state == JobState::kCancelled) counters_.cancelled.fetch_add(1, std::memory_order_relaxed);
}

void AgentCore::tell(RemoteRecord& record) {
  if (record.is_terminal() && !record.is_told_end.exchange(true)) {
    const bool is_done = record.state.load() == JobState::kDone;
    // Of a write, the receiver knows itself when the bytes have arrived.
    if (is_done && !record.is_write && !record.note.empty()) {
      const auto connections = connections_of(record.peer);
      if (!connections.empty()) {
        (void)connections.front()->send_payload(wire::Type::kNote, record.note);
      }
    }
  }
  if (!record.is_quiesced.load() || record.is_told_quiet.exchange(true)) return;
  if (record.own_lease != 0) (void)leases_->revoke(record.own_lease, 0.0);
  record.region.release();
  if (record.on_quiesced) record.on_quiesced();
  record.on_quiesced = nullptr;
}

bool AgentCore::end_early(RemoteRecord& record, JobState state, Code begun_code) {
  if (record.is_claimed.exchange(true, std::memory_order_acq_rel)) return false;
  record.ledger.settle_rest(begun_code);
  end(record, state);
  // Whatever the peer copies out of our memory from now on is not what was asked for.
  if (record.own_lease != 0) (void)leases_->revoke(record.own_lease, 0.0);
  puller_.forget(record);
  detach(record);
  tell(record);
  return true;
}

void AgentCore::lose(RemoteRecord& record) {
  record.is_lost.store(true, std::memory_order_release);
  record.has_failed.store(true, std::memory_order_relaxed);
  (void)end_early(record, JobState::kFailed, Code::kPeerLost);
}

void AgentCore::detach(RemoteRecord& record) {
  for (const auto& weak : record.connections) {
    if (const auto connection = weak.lock(); connection != nullptr) connection->abandon(record.id);
  }
}

bool AgentCore::cancel(RemoteRecord& record) {
  if (record.is_terminal()) return false;
  if (!record.is_write) return end_early(record, JobState::kCancelled, Code::kCancelled);
  if (record.is_cancelled.exchange(true)) return !record.is_terminal();
  // Its receiver says how far it came; should it not, the record ends without its word.
  detach(record);
  loops_.front()->call_at(time_after(options_.cancel_grace_s),
                          [this, weak = record.weak_from_this()] {
                            if (const auto alive = weak.lock(); alive != nullptr) {
                              end_early(*alive, JobState::kCancelled, Code::kCancelled);
                            }
                          });
  return true;
}

bool AgentCore::watch(RemoteRecord& record) {
  std::lock_guard lock(record.mutex);
  record.is_watched.store(true);
  return record.is_terminal();
}

bool AgentCore::wait(RemoteRecord& record, double timeout_s) {
  const TimePoint until = time_after(timeout_s);
  const auto is_over = [&record] { return record.is_terminal(); };
  while (timeout_s > 0.0 && !is_over() && Clock::now() < until && puller_.help(record)) {
  }
  if (is_over()) return true;
  if (timeout_s > 0.0 && record.connections.size() == 1) {
    const std::shared_ptr<Connection> connection = record.connections.front().lock();
    thread_local const UniqueFd waker(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    bool is_ours = false;
    if (connection != nullptr) {
      std::lock_guard lock(record.mutex);
      is_ours = !is_over() && record.waker < 0;
      if (is_ours) record.waker = waker.get();
    }
    if (is_ours) {
      (void)connection->receive_until(is_over, waker.get(), until,
                                      record.plan->total_bytes < kConfirmedBytes);
      std::lock_guard lock(record.mutex);
      record.waker = -1;
      uint64_t count;
      (void)!read(waker.get(), &count, sizeof(count));
    }
  }
  if (is_over()) return true;
  std::unique_lock lock(record.mutex);
  return record.ended.wait_until(lock, until, is_over);
}

std::vector<Quarantined> AgentCore::quarantine() const {
  std::vector<Quarantined> found;
  std::lock_guard lock(records_mutex_);
  for (const auto& [id, record] : records_) {
    if (!record->is_terminal() || record->is_quiesced.load() || record->is_served) continue;
    const auto ended_at = record->begun_at + std::chrono::nanoseconds(record->latency_ns.load());
    found.push_back({.id = id,
                     .peer = record->peer,
                     .is_write = record->is_write,
                     .bytes = record->plan->total_bytes,
                     .since_s = std::chrono::duration<double>(Clock::now() - ended_at).count()});
  }
  return found;
}

AgentStats AgentCore::stats() const {
  AgentStats stats;
  for (const auto& connection : all_connections()) {
    ++stats.connections;
    stats.served += connection->served();
  }
  const auto regions = regions_.all();
  stats.regions = static_cast<int64_t>(regions.size());
  stats.region_bytes = regions_.bytes();
  stats.leases = leases_->live();
  stats.lease_bytes = leases_->bytes();
  const AgentCounters& seen = counters_;
  stats.running = seen.running.load();
  stats.quarantined = seen.quarantined.load();
  stats.quarantined_bytes = seen.quarantined_bytes.load();
  stats.reads = seen.reads.load();
  stats.writes = seen.writes.load();
  stats.failed = seen.failed.load();
  stats.timed_out = seen.timed_out.load();
  stats.cancelled = seen.cancelled.load();
  stats.bytes_read = seen.bytes_read.load();
  stats.bytes_written = seen.bytes_written.load();
  stats.bytes_served = seen.bytes_served.load();
  stats.corrupt_blocks = seen.corrupt_blocks.load();
  stats.stale_blocks = seen.stale_blocks.load();
  stats.refused_requests = seen.refused_requests.load();
  stats.malformed_frames = seen.malformed_frames.load();
  stats.late_pieces = seen.late_pieces.load();
  stats.dropped_events = events_.dropped();
  return stats;
}

AgentCloseReport AgentCore::close(double timeout_s) {
  AgentCloseReport report;
  if (is_closed_.exchange(true)) return report;
  const TimePoint until = time_after(timeout_s);
  const auto is_idle = [this] { return records_.empty(); };
  std::vector<std::shared_ptr<RemoteRecord>> left;
  {
    std::unique_lock lock(records_mutex_);
    records_emptied_.wait_until(lock, time_after(timeout_s / 2), is_idle);
    for (const auto& [id, record] : records_) left.push_back(record);
  }
  for (const auto& record : left) {
    const bool is_ours = !record->is_served;
    if (end_early(*record, JobState::kCancelled, Code::kCancelled) && is_ours) {
      ++report.cancelled_jobs;
    }
  }
  // Without connections nothing is received or sent, so what peers might still do is their own.
  for (const auto& connection : all_connections()) connection->close("the agent was closed");
  {
    std::unique_lock lock(records_mutex_);
    records_emptied_.wait_until(lock, until, is_idle);
  }
  puller_.stop();
  for (const auto& loop : loops_) loop->stop();
  {
    std::lock_guard lock(records_mutex_);
    for (const auto& [id, record] : records_) {
      ++report.abandoned_jobs;
      report.abandoned_bytes += record->plan->total_bytes;
    }
    records_.clear();
    deadlines_.clear();
  }
  {
    std::lock_guard lock(peers_mutex_);
    listeners_.clear();
    connections_.clear();
    peers_.clear();
  }
  leases_->close_fd();
  events_.close();
  return report;
}

}  // namespace kvx
