#include "engine_core.h"

#include <algorithm>
#include <cmath>

#include "shim/sabotage.h"

namespace kvx {

namespace {

// Idle threads need a moment to notice that the engine closes, even with a bound of zero.
constexpr double kThreadExitS = 0.1;

}  // namespace

Status EngineCore::start(const EngineOptions& options, std::string* backend_reason) {
  Status status = completions_.open();
  if (!status.ok()) return status;
  status = make_backend(
      options.backend, options.backend_options,
      [this](std::span<const IoCompletion> completions) { on_completions(completions); }, &backend_,
      backend_reason);
  if (!status.ok()) return status;
  if (options.backend_options.failpoints != nullptr) {
    copy_faults_ = std::make_shared<CopyFaults>(options.backend_options.failpoints);
    options.backend_options.failpoints->listen(copy_faults_);
  }
  const int cpus = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  pool_.start(options.copy_threads == 0 ? cpus : options.copy_threads, shared_from_this(),
              [this](JobRecord& job, const Grain& grain) { run_grain(job, grain); });
  canceller_.start(shared_from_this(), backend_.get());
  reactor_ = std::thread([core = shared_from_this()] { core->run_reactor(); });
  return Status::Ok();
}

Status EngineCore::attach_device(std::shared_ptr<Device> device, const CopyOptions& options) {
  if (has_device()) return {Code::kUsage, "the engine has a device already"};
  Status status = device->make_copies(
      options, [this](std::span<const CopyCompletion> completions) { on_copies(completions); },
      &copies_);
  if (!status.ok()) return status;
  device_ = std::move(device);
  canceller_.add_copies(copies_.get());
  return Status::Ok();
}

Status EngineCore::submit(Batch batch, double deadline_s, std::shared_ptr<JobRecord>* job) {
  if (std::isnan(deadline_s)) return {Code::kUsage, "deadline_s is not a number"};
  if (Status status = validate(batch); !status.ok()) return status;
  if (batch.needs_device() && !has_device()) {
    return {Code::kUsage, "the engine has no device; attach one first"};
  }
  auto made = std::make_shared<JobRecord>(next_id_.fetch_add(1, std::memory_order_relaxed),
                                          std::move(batch), time_after(deadline_s));
  made->core = shared_from_this();
  if (!table_.add(made)) {
    made->core.reset();
    return {Code::kCancelled, "the engine is closed"};
  }
  counters_.on_begin(*made);
  if (made->batch.progress != nullptr) made->batch.progress->join(made->id);
  *job = made;
  if (deadline_s <= 0.0) {
    end_early(*made, JobState::kTimedOut);
  } else if (made->batch.blocks() == 0) {
    submit_syncs(*made);
    settle_balance(*made, made->ledger.release(0, 0));
  } else if (made->batch.is_io()) {
    submit_io(*made);
  } else if (made->batch.is_inbound() || made->batch.is_inside_device()) {
    submit_copies(*made);
  } else {
    made->publish_all();
    pool_.offer(made);
  }
  return Status::Ok();
}

void EngineCore::run_reactor() {
  for (;;) {
    const std::vector<std::shared_ptr<JobRecord>> expired = table_.wait_expired();
    if (expired.empty()) return;
    for (const auto& job : expired) end_early(*job, JobState::kTimedOut);
  }
}

bool EngineCore::end_early(JobRecord& job, JobState state) {
  if (job.is_claimed.exchange(true, std::memory_order_acq_rel)) return false;
  job.ledger.settle_rest(state == JobState::kTimedOut ? Code::kTimeout : Code::kCancelled);
  end(job, state);
  const bool has_requests = job.batch.is_io() || job.batch.needs_device();
  if (has_requests && !job.is_quiesced) canceller_.cancel_requests(job.shared_from_this());
  return true;
}

// What to do after counts were given back: end the job, call it quiesced, or nothing.
void EngineCore::settle_balance(JobRecord& job, Balance balance) {
  if (balance.open == 0 && !job.is_claimed.exchange(true, std::memory_order_acq_rel)) {
    end(job, job.has_failed.load(std::memory_order_relaxed) ? JobState::kFailed : JobState::kDone);
  } else if (balance.holds == 0) {
    quiesce(job);
  }
}

// REQUIRES: the caller claimed the job, and keeps it alive.
void EngineCore::end(JobRecord& job, JobState state) {
  job.latency_ns.store(ns_between(job.begun_at, Clock::now()), std::memory_order_relaxed);
  table_.drop_deadline(job);
  counters_.on_end(
      job, state,
      state == JobState::kDone ? Totals{job.batch.blocks(), job.total_bytes} : job.done());
  std::lock_guard lock(job.mutex);
  // After the rest of the blocks was decided, so that whoever is refused has nothing left to
  // decide.
  job.planes_gate.end();
  // Whoever gives back the last hold waits in quiesce() for the lock, so the ends keep their order.
  const bool is_quiet = job.ledger.release(1, 0).holds == 0;
  if (is_quiet) {
    table_.remove(job);
  } else {
    counters_.on_quarantine(job, 1);
  }
  const bool is_free = is_quiet || makes(Mistake::kQuiescesEarly);
  job.state.store(state, std::memory_order_release);
  job.is_quiesced.store(is_free, std::memory_order_release);
  completions_.push(
      {job.id, static_cast<uint8_t>(is_free ? kFlagTerminal | kFlagQuiesced : kFlagTerminal)});
  job.ended.notify_all();
  if (job.batch.progress != nullptr) {
    job.batch.progress->advance(job.id, job.batch.progress->layers());
  }
}

void EngineCore::quiesce(JobRecord& job) {
  std::lock_guard lock(job.mutex);
  counters_.on_quarantine(job, -1);
  table_.remove(job);
  job.is_quiesced.store(true, std::memory_order_release);
  completions_.push({job.id, kFlagQuiesced});
  job.ended.notify_all();
}

bool EngineCore::begin_copies(JobRecord& job, bool of_planes) {
  if (of_planes && !job.planes_gate.enter()) return false;
  // Refused once quiesced: whoever waited for that may have freed the memory.
  if (job.ledger.try_hold(1)) return true;
  end_copies(job, of_planes);
  return false;
}

void EngineCore::end_copies(JobRecord& job, bool of_planes) {
  if (!of_planes || !job.planes_gate.leave()) return;
  // Waiters look under the mutex: one that saw the planes in use sleeps by now.
  std::lock_guard lock(job.mutex);
  job.ended.notify_all();
}

CloseReport EngineCore::close(double timeout_s) {
  std::lock_guard lock(close_mutex_);
  if (is_shut_) return close_report_;
  is_shut_ = true;
  const TimePoint until = time_after(timeout_s);
  table_.close();
  table_.wait_empty(time_after(timeout_s / 2));
  for (const auto& job : table_.all()) {
    if (end_early(*job, JobState::kCancelled)) ++close_report_.cancelled_jobs;
  }
  table_.wait_empty(until);
  canceller_.stop();
  // Their counts are of requests; ours is of jobs.
  (void)backend_->close(seconds_until(until));
  if (copies_ != nullptr) (void)copies_->close(seconds_until(until));
  pool_.stop(std::max(until, time_after(kThreadExitS)));
  table_.stop_waiting();
  if (reactor_.joinable()) reactor_.join();
  for (const auto& job : table_.take_all()) {
    ++close_report_.abandoned_jobs;
    close_report_.abandoned_bytes += job->total_bytes;
  }
  completions_.close();
  // Its copies are over, and whoever keeps the closed engine for its counters need not keep it.
  if (close_report_.abandoned_jobs == 0) device_.reset();
  return close_report_;
}

EngineStats EngineCore::stats() const {
  EngineStats stats;
  counters_.fill(&stats);
  stats.copy_threads = pool_.threads();
  stats.copy_queue_jobs = pool_.queued();
  stats.completions_waiting = completions_.waiting();
  stats.completions_dropped = completions_.dropped();
  return stats;
}

}  // namespace kvx
