#include "canceller.h"

#include <vector>

namespace kvx {

void Canceller::start(std::shared_ptr<void> owner, IoBackend* backend) {
  backend_ = backend;
  thread_ = std::thread([this, owner = std::move(owner)] { run(); });
}

void Canceller::cancel_requests(std::shared_ptr<JobRecord> job) {
  std::lock_guard lock(mutex_);
  if (is_stopping_) return;
  queue_.push_back(std::move(job));
  news_.notify_one();
}

void Canceller::stop() {
  {
    std::lock_guard lock(mutex_);
    is_stopping_ = true;
    news_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
  queue_.clear();
}

void Canceller::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    news_.wait(lock, [this] { return !queue_.empty() || is_stopping_; });
    if (is_stopping_) return;
    std::shared_ptr<JobRecord> job = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    for (IoSlot& slot : job->slots) {
      if (is_stopping_) break;
      if (!slot.is_in_flight.load(std::memory_order_acquire)) continue;
      backend_->cancel(reinterpret_cast<uint64_t>(&slot));
    }
    cancel_copies(*job);
    job.reset();
    lock.lock();
  }
}

void Canceller::cancel_copies(JobRecord& job) {
  CopyBackend* copies = copies_.load(std::memory_order_acquire);
  if (copies == nullptr) return;
  std::vector<uint64_t> tokens;
  {
    std::lock_guard lock(job.groups_mutex);
    for (const CopyGroup& group : job.groups) {
      if (group.is_in_flight.load(std::memory_order_acquire)) {
        tokens.push_back(reinterpret_cast<uint64_t>(&group));
      }
    }
  }
  for (const uint64_t token : tokens) copies->cancel(token);
}

}  // namespace kvx
