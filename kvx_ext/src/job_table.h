// The jobs of an engine that are not quiesced yet, and the order of their deadlines.
//
// The table is what keeps a job and its arrays alive while bytes move, whatever becomes of the
// handles. No method calls out while it holds the lock.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "clock.h"
#include "job_record.h"

namespace kvx {

class JobTable {
 public:
  // False once closed.
  bool add(const std::shared_ptr<JobRecord>& job);
  // The job is terminal: its deadline means nothing any more.
  void drop_deadline(const JobRecord& job);
  void remove(const JobRecord& job);

  // Waits until jobs have passed their deadlines and returns them; empty: closed and stopped.
  std::vector<std::shared_ptr<JobRecord>> wait_expired();
  void stop_waiting();

  // Refuses new jobs.
  void close();
  bool is_closed() const;
  bool wait_empty(TimePoint until);
  std::vector<std::shared_ptr<JobRecord>> all() const;
  // Forgets what is left, breaking the cycle of jobs and engine.
  std::vector<std::shared_ptr<JobRecord>> take_all();

 private:
  using Deadline = std::pair<TimePoint, uint64_t>;

  mutable std::mutex mutex_;
  std::condition_variable sooner_;
  std::condition_variable emptied_;
  std::unordered_map<uint64_t, std::shared_ptr<JobRecord>> jobs_;  // mutex_
  std::set<Deadline> deadlines_;                                   // mutex_
  // What the reactor sleeps until. Jobs that end leave it as it is: waking it once in vain is
  // cheaper than waking it for every job.
  TimePoint alarm_ = TimePoint::max();  // mutex_
  bool is_closed_ = false;              // mutex_
  bool is_stopped_ = false;             // mutex_
};

}  // namespace kvx
