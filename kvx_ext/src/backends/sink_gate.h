// What stands between a backend's threads and the caller's sink: one call at a time, a count of
// requests that still owe a completion, and a way to shut the sink off for good. Files and devices
// have it in common, so it is a template over what a completion is.
//
// Lock order: the gate's call lock, then a backend's own lock, then the gate's count lock. So a
// sink may submit() and cancel(), and a backend must hold none of its locks when it delivers.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "kvx/backend.h"

namespace kvx {

template <typename Completion>
class SinkGateOf {
 public:
  using Sink = std::function<void(std::span<const Completion>)>;

  explicit SinkGateOf(Sink sink) : sink_(std::move(sink)) {}
  SinkGateOf(const SinkGateOf&) = delete;
  SinkGateOf& operator=(const SinkGateOf&) = delete;

  // Counts requests that were accepted. Call it under the lock that also guards "is still open".
  void expect(size_t requests) {
    std::lock_guard lock(count_mutex_);
    owed_ += static_cast<int64_t>(requests);
  }

  void deliver(std::span<const Completion> completions) {
    if (completions.empty()) return;
    std::lock_guard call(call_mutex_);
    if (is_shut_) return;
    sink_(completions);
    std::lock_guard lock(count_mutex_);
    owed_ -= static_cast<int64_t>(completions.size());
    if (owed_ == 0) drained_.notify_all();
  }

  // Completes requests that were never accepted, on this thread.
  template <typename Request>
  void refuse(std::span<const Request> requests) {
    std::vector<Completion> completions;
    for (const Request& request : requests) {
      completions.push_back({request.token, Code::kCancelled, 0});
    }
    if (!completions.empty()) sink_(completions);
  }

  bool wait_drained(std::chrono::steady_clock::time_point deadline) {
    std::unique_lock lock(count_mutex_);
    return drained_.wait_until(lock, deadline, [this] { return owed_ == 0; });
  }

  int64_t owed() const {
    std::lock_guard lock(count_mutex_);
    return owed_;
  }

  // After this no delivery reaches the sink; returns how many requests are still owed one.
  int64_t shut() {
    std::lock_guard call(call_mutex_);
    is_shut_ = true;
    std::lock_guard lock(count_mutex_);
    return owed_;
  }

 private:
  const Sink sink_;
  std::mutex call_mutex_;
  bool is_shut_ = false;  // call_mutex_
  mutable std::mutex count_mutex_;
  std::condition_variable drained_;
  int64_t owed_ = 0;  // count_mutex_
};

using SinkGate = SinkGateOf<IoCompletion>;

inline std::chrono::steady_clock::time_point deadline_after(double timeout_s) {
  // A year stands for "for ever": larger values overflow the clock.
  const double bounded_s = timeout_s < 0.0 ? 0.0 : (timeout_s > 3.15e7 ? 3.15e7 : timeout_s);
  return std::chrono::steady_clock::now() +
         std::chrono::duration_cast<std::chrono::steady_clock::duration>(
             std::chrono::duration<double>(bounded_s));
}

}  // namespace kvx
