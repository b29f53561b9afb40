#include "job_table.h"

namespace kvx {

bool JobTable::add(const std::shared_ptr<JobRecord>& job) {
  std::lock_guard lock(mutex_);
  if (is_closed_) return false;
  jobs_.emplace(job->id, job);
  deadlines_.emplace(job->deadline, job->id);
  if (job->deadline < alarm_) {
    alarm_ = job->deadline;
    sooner_.notify_one();
  }
  return true;
}

void JobTable::drop_deadline(const JobRecord& job) {
  std::lock_guard lock(mutex_);
  deadlines_.erase({job.deadline, job.id});
}

void JobTable::remove(const JobRecord& job) {
  std::shared_ptr<JobRecord> last;  // may be the last owner: die outside the lock
  std::lock_guard lock(mutex_);
  const auto found = jobs_.find(job.id);
  if (found == jobs_.end()) return;
  last = std::move(found->second);
  jobs_.erase(found);
  if (jobs_.empty()) emptied_.notify_all();
}

std::vector<std::shared_ptr<JobRecord>> JobTable::wait_expired() {
  std::vector<std::shared_ptr<JobRecord>> expired;
  std::unique_lock lock(mutex_);
  while (!is_stopped_) {
    const TimePoint now = Clock::now();
    while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
      const auto found = jobs_.find(deadlines_.begin()->second);
      if (found != jobs_.end()) expired.push_back(found->second);
      deadlines_.erase(deadlines_.begin());
    }
    // Also when returning: a job added meanwhile is then found on the way back.
    alarm_ = deadlines_.empty() ? TimePoint::max() : deadlines_.begin()->first;
    if (!expired.empty()) break;
    if (deadlines_.empty()) {
      sooner_.wait(lock);
    } else {
      sooner_.wait_until(lock, alarm_);
    }
  }
  return expired;
}

void JobTable::stop_waiting() {
  std::lock_guard lock(mutex_);
  is_stopped_ = true;
  sooner_.notify_all();
}

void JobTable::close() {
  std::lock_guard lock(mutex_);
  is_closed_ = true;
}

bool JobTable::is_closed() const {
  std::lock_guard lock(mutex_);
  return is_closed_;
}

bool JobTable::wait_empty(TimePoint until) {
  std::unique_lock lock(mutex_);
  return emptied_.wait_until(lock, until, [this] { return jobs_.empty(); });
}

std::vector<std::shared_ptr<JobRecord>> JobTable::all() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<JobRecord>> jobs;
  jobs.reserve(jobs_.size());
  for (const auto& [id, job] : jobs_) jobs.push_back(job);
  return jobs;
}

std::vector<std::shared_ptr<JobRecord>> JobTable::take_all() {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<JobRecord>> jobs;
  for (auto& [id, job] : jobs_) jobs.push_back(std::move(job));
  jobs_.clear();
  deadlines_.clear();
  return jobs;
}

}  // namespace kvx
