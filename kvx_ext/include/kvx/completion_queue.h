// Notifications of all jobs of one engine: taken in batches by one reactor, or through an eventfd.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <vector>

#include "kvx/status.h"

namespace kvx {

inline constexpr uint8_t kFlagTerminal = 1;
inline constexpr uint8_t kFlagQuiesced = 2;

// An engine whose user only ever waits on jobs never takes notifications; the oldest are dropped.
inline constexpr size_t kCompletionsMax = size_t{1} << 20;

struct Completion {
  uint64_t job_id = 0;
  uint8_t flags = 0;
};

class CompletionQueue {
 public:
  CompletionQueue() = default;
  ~CompletionQueue();
  CompletionQueue(const CompletionQueue&) = delete;
  CompletionQueue& operator=(const CompletionQueue&) = delete;

  // Makes the eventfd.
  Status open();

  void push(Completion completion);
  // Waits for the first one, then takes what is there.
  std::vector<Completion> take(size_t max, double timeout_s);
  // Ends every wait now and in future.
  void close();

  // Signals the eventfd from now on; until asked for, it costs nothing.
  int fileno();
  int64_t waiting() const;
  int64_t dropped() const;

 private:
  void signal();
  void reset_signal();

  mutable std::mutex mutex_;
  std::condition_variable news_;
  std::deque<Completion> queue_;  // mutex_
  int waiters_ = 0;               // mutex_
  int event_fd_ = -1;
  int64_t dropped_ = 0;        // mutex_
  bool has_listener_ = false;  // mutex_
  bool is_signalled_ = false;  // mutex_
  bool is_closed_ = false;     // mutex_
};

}  // namespace kvx
