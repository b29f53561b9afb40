// The copy threads. Jobs with ready blocks stand in a ring; whoever is free takes one grain of the
// first and sends it to the back, so that a small job never waits for the whole of a large one.
//
// At most `threads` threads copy at once, threads that wait for their own job (help()) included:
// more only take memory bandwidth from each other. The lock is taken once or twice a grain.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "clock.h"
#include "job_record.h"

namespace kvx {

class WorkerPool {
 public:
  using RunGrain = std::function<void(JobRecord&, const Grain&)>;

  // `owner` is what `run` needs; the threads keep it alive.
  void start(int threads, std::shared_ptr<void> owner, RunGrain run);

  // Makes a job's ready blocks known. Cheap if it stands in the ring already.
  void offer(const std::shared_ptr<JobRecord>& job);

  // Copies one grain of `job` on the calling thread; false when there is none or no room.
  bool help(JobRecord& job);

  // Ends the threads. One that is stuck in a grain past `until` is left behind, detached.
  void stop(TimePoint until);

  int64_t queued() const;
  int threads() const { return threads_; }

 private:
  void run_thread();
  std::shared_ptr<JobRecord> take_next(Grain* grain);
  void wake(int64_t wanted);

  RunGrain run_;
  int threads_ = 0;
  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable exits_;
  std::deque<std::shared_ptr<JobRecord>> ring_;  // mutex_
  std::vector<std::thread> pool_;
  int idle_ = 0;              // mutex_: threads in the wait for work
  int copying_ = 0;           // mutex_
  int exited_ = 0;            // mutex_
  bool is_stopping_ = false;  // mutex_
};

}  // namespace kvx
