// What an agent tells the one who reads its events.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "kvx/agent.h"

namespace kvx {

// Peers fill the queue, so it is bounded; ends of our own jobs and of connections always fit.
inline constexpr size_t kEventsMax = size_t{1} << 16;
inline constexpr size_t kEventBytesMax = size_t{256} << 20;

class EventQueue {
 public:
  // False: dropped, there is no room for what a peer sent.
  bool push(AgentEvent event);
  // Waits for the first one, then takes what is there.
  std::vector<AgentEvent> take(size_t max, double timeout_s);
  void wake();
  void close();
  int64_t dropped() const;

 private:
  mutable std::mutex mutex_;
  std::condition_variable news_;
  std::deque<AgentEvent> queue_;  // mutex_
  size_t bytes_ = 0;              // mutex_
  int64_t dropped_ = 0;           // mutex_
  bool is_woken_ = false;         // mutex_
  bool is_closed_ = false;        // mutex_
};

}  // namespace kvx
