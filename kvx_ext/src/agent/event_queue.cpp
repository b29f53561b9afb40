#include "agent/event_queue.h"

#include <algorithm>

#include "clock.h"

namespace kvx {

namespace {

bool is_from_peer(EventKind kind) {
  return kind == EventKind::kGreeting || kind == EventKind::kMessage || kind == EventKind::kNote;
}

}  // namespace

bool EventQueue::push(AgentEvent event) {
  {
    std::lock_guard lock(mutex_);
    const bool is_full =
        queue_.size() >= kEventsMax || bytes_ + event.payload.size() > kEventBytesMax;
    if (is_full && is_from_peer(event.kind)) {
      ++dropped_;
      return false;
    }
    bytes_ += event.payload.size();
    queue_.push_back(std::move(event));
  }
  news_.notify_one();
  return true;
}

std::vector<AgentEvent> EventQueue::take(size_t max, double timeout_s) {
  std::unique_lock lock(mutex_);
  news_.wait_until(lock, time_after(timeout_s),
                   [this] { return !queue_.empty() || is_woken_ || is_closed_; });
  is_woken_ = false;
  std::vector<AgentEvent> taken;
  while (!queue_.empty() && taken.size() < max) {
    bytes_ -= queue_.front().payload.size();
    taken.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  return taken;
}

void EventQueue::wake() {
  {
    std::lock_guard lock(mutex_);
    is_woken_ = true;
  }
  news_.notify_all();
}

void EventQueue::close() {
  {
    std::lock_guard lock(mutex_);
    is_closed_ = true;
  }
  news_.notify_all();
}

int64_t EventQueue::dropped() const {
  std::lock_guard lock(mutex_);
  return dropped_;
}

}  // namespace kvx
