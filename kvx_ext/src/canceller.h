// Asks the backends to give up what jobs that ended early still have in them, on a thread of its
// own.
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
#include "kvx/device.h"

namespace kvx {

class Canceller {
 public:
  // `owner` is kept alive by the thread, and `backend` with it.
  void start(std::shared_ptr<void> owner, IoBackend* backend);
  // A second backend, for copies; before any job has some.
  void add_copies(CopyBackend* copies) { copies_.store(copies, std::memory_order_release); }
  void cancel_requests(std::shared_ptr<JobRecord> job);
  // Forgets what is left: closing the backend cancels it all.
  void stop();

 private:
  void run();
  void cancel_copies(JobRecord& job);

  IoBackend* backend_ = nullptr;
  std::atomic<CopyBackend*> copies_{nullptr};
  std::thread thread_;
  std::mutex mutex_;
  std::condition_variable news_;
  std::deque<std::shared_ptr<JobRecord>> queue_;  // mutex_
  std::atomic<bool> is_stopping_{false};
};

}  // namespace kvx
