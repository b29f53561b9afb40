#include "worker_pool.h"

#include <algorithm>

namespace kvx {

void WorkerPool::start(int threads, std::shared_ptr<void> owner, RunGrain run) {
  run_ = std::move(run);
  threads_ = threads;
  for (int i = 0; i < threads; ++i) {
    pool_.emplace_back([this, owner] { run_thread(); });
  }
}

void WorkerPool::offer(const std::shared_ptr<JobRecord>& job) {
  std::lock_guard lock(mutex_);
  const int64_t grains = job->ready_grains();
  if (grains == 0 || is_stopping_) return;
  if (!job->is_queued) {
    job->is_queued = true;
    ring_.push_back(job);
  }
  wake(grains);
}

bool WorkerPool::help(JobRecord& job) {
  Grain grain;
  {
    std::lock_guard lock(mutex_);
    if (copying_ >= threads_ || is_stopping_ || !job.take(&grain)) return false;
    ++copying_;
  }
  run_(job, grain);
  std::lock_guard lock(mutex_);
  --copying_;
  // A thread may have been turned away while this one took its place.
  if (!ring_.empty() && ring_.front()->has_ready()) wake(1);
  return true;
}

void WorkerPool::stop(TimePoint until) {
  std::unique_lock lock(mutex_);
  is_stopping_ = true;
  work_.notify_all();
  const bool all_exited = exits_.wait_until(lock, until, [this] { return exited_ == threads_; });
  ring_.clear();
  lock.unlock();
  // Which ones are stuck does not matter: they share this pool's owner and touch nothing else.
  for (std::thread& thread : pool_) {
    if (all_exited) {
      thread.join();
    } else {
      thread.detach();
    }
  }
  pool_.clear();
}

int64_t WorkerPool::queued() const {
  std::lock_guard lock(mutex_);
  return static_cast<int64_t>(ring_.size());
}

void WorkerPool::run_thread() {
  std::unique_lock lock(mutex_);
  while (!is_stopping_) {
    Grain grain;
    std::shared_ptr<JobRecord> job = copying_ < threads_ ? take_next(&grain) : nullptr;
    if (job == nullptr) {
      ++idle_;
      work_.wait(lock);
      --idle_;
      continue;
    }
    ++copying_;
    lock.unlock();
    run_(*job, grain);
    job.reset();
    lock.lock();
    --copying_;
  }
  ++exited_;
  exits_.notify_all();
}

// Also takes jobs out of the ring that have nothing ready any more; offer() brings them back.
std::shared_ptr<JobRecord> WorkerPool::take_next(Grain* grain) {
  while (!ring_.empty()) {
    std::shared_ptr<JobRecord> job = std::move(ring_.front());
    ring_.pop_front();
    const bool has_taken = job->take(grain);
    job->is_queued = job->has_ready();
    if (job->is_queued) ring_.push_back(job);
    if (has_taken) return job;
  }
  return nullptr;
}

void WorkerPool::wake(int64_t wanted) {
  const int64_t count = std::min<int64_t>(wanted, idle_);
  for (int64_t i = 0; i < count; ++i) work_.notify_one();
}

}  // namespace kvx
