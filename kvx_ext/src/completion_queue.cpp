#include "kvx/completion_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "clock.h"

namespace kvx {

CompletionQueue::~CompletionQueue() {
  if (event_fd_ >= 0) ::close(event_fd_);
}

Status CompletionQueue::open() {
  event_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (event_fd_ >= 0) return Status::Ok();
  const int error = errno;
  return {Code::kUnavailable, std::string("eventfd: ") + std::strerror(error), error};
}

void CompletionQueue::push(Completion completion) {
  std::lock_guard lock(mutex_);
  if (queue_.size() >= kCompletionsMax) {
    queue_.pop_front();
    ++dropped_;
  }
  queue_.push_back(completion);
  if (waiters_ > 0) news_.notify_one();
  signal();
}

std::vector<Completion> CompletionQueue::take(size_t max, double timeout_s) {
  const TimePoint until = time_after(timeout_s);
  std::unique_lock lock(mutex_);
  ++waiters_;
  news_.wait_until(lock, until, [this] { return !queue_.empty() || is_closed_; });
  --waiters_;
  const auto count = static_cast<std::ptrdiff_t>(std::min(max, queue_.size()));
  std::vector<Completion> taken(queue_.begin(), queue_.begin() + count);
  queue_.erase(queue_.begin(), queue_.begin() + count);
  if (queue_.empty()) reset_signal();
  return taken;
}

void CompletionQueue::close() {
  std::lock_guard lock(mutex_);
  is_closed_ = true;
  news_.notify_all();
}

int CompletionQueue::fileno() {
  std::lock_guard lock(mutex_);
  has_listener_ = true;
  if (!queue_.empty()) signal();
  return event_fd_;
}

int64_t CompletionQueue::waiting() const {
  std::lock_guard lock(mutex_);
  return static_cast<int64_t>(queue_.size());
}

int64_t CompletionQueue::dropped() const {
  std::lock_guard lock(mutex_);
  return dropped_;
}

void CompletionQueue::signal() {
  if (!has_listener_ || is_signalled_) return;
  // The counter is 0 or 1, so neither call can block or fail.
  (void)eventfd_write(event_fd_, 1);
  is_signalled_ = true;
}

void CompletionQueue::reset_signal() {
  if (!is_signalled_) return;
  eventfd_t count = 0;
  (void)eventfd_read(event_fd_, &count);
  is_signalled_ = false;
}

}  // namespace kvx
