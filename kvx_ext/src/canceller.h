// Asks the backend to give up the I/O of jobs that ended early, on a thread of its own.
//
// A backend may look through its whole queue for every request it is asked about: 30,000 of them
// took 0.65 s, in which the reactor would have met no other deadline.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "job_record.h"
#include "kvx/backend.h"

namespace kvx {

class Canceller {
 public:
  // `owner` is kept alive by the thread, and `backend` with it.
  void start(std::shared_ptr<void> owner, IoBackend* backend);
  void cancel_io(std::shared_ptr<JobRecord> job);
  // Forgets what is left: closing the backend cancels it all.
  void stop();

 private:
  void run();

  IoBackend* backend_ = nullptr;
  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable news_;
  std::deque<std::shared_ptr<JobRecord>> queue_;  // mutex_
  std::atomic<bool> is_stopping_{false};
};

}  // namespace kvx
