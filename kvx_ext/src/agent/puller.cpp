#include "agent/puller.h"

#include <algorithm>
#include <system_error>

namespace kvx {

void Puller::start(int threads, OnGrain on_grain) {
  threads_ = threads;
  on_grain_ = std::move(on_grain);
}

void Puller::submit(std::shared_ptr<PullTask> task, bool wakes) {
  const RemoteRecord* record = task->record.get();
  std::lock_guard lock(mutex_);
  if (is_stopping_) return;
  places_[record] = ring_.insert(ring_.end(), std::move(task));
  if (wakes) call_threads(1);
}

void Puller::wake() {
  std::lock_guard lock(mutex_);
  if (!ring_.empty()) call_threads(1);
}

bool Puller::help(RemoteRecord& record) {
  Taken taken;
  {
    std::lock_guard lock(mutex_);
    const auto found = places_.find(&record);
    if (found == places_.end() || copying_ >= threads_ || is_stopping_) return false;
    taken = take(found->second);
    if (taken.count == 0) return false;  // unlocked before the task is let go of
    ++copying_;
    ++helping_;
  }
  run_grain(taken);
  taken.task.reset();
  std::lock_guard lock(mutex_);
  --copying_;
  if (--helping_ == 0) helped_.notify_all();
  // Others may have been turned away while this one took their place.
  if (!ring_.empty()) call_threads(1);
  return true;
}

void Puller::forget(const RemoteRecord& record) {
  Ring left;
  std::lock_guard lock(mutex_);
  const auto found = places_.find(&record);
  if (found != places_.end()) leave(found->second, &left);
}

void Puller::stop() {
  Ring left;
  std::vector<std::thread> pool;
  {
    std::unique_lock lock(mutex_);
    is_stopping_ = true;
    work_.notify_all();
    helped_.wait(lock, [this] { return helping_ == 0; });
    places_.clear();
    left.swap(ring_);
    pool.swap(pool_);
  }
  for (std::thread& thread : pool) thread.join();
}

int64_t Puller::queued() const {
  std::lock_guard lock(mutex_);
  return static_cast<int64_t>(ring_.size());
}

int Puller::threads_begun() const {
  std::lock_guard lock(mutex_);
  return static_cast<int>(pool_.size());
}

void Puller::run() {
  std::unique_lock lock(mutex_);
  while (!is_stopping_) {
    if (ring_.empty() || copying_ >= threads_) {
      ++idle_;
      work_.wait(lock);
      --idle_;
      continue;
    }
    Taken taken = take(ring_.begin());
    ++copying_;
    // One wakes the next, so that a submit pays for one at most.
    if (!ring_.empty()) call_threads(1);
    lock.unlock();
    run_grain(taken);
    taken.task.reset();
    lock.lock();
    --copying_;
  }
}

void Puller::run_grain(const Taken& taken) {
  if (taken.count == 0) return;
  RemoteRecord& record = *taken.task->record;
  // Refused once quiesced: whoever waited for that may have freed the memory.
  if (!record.ledger.try_hold(1)) return;
  int64_t settled = 0;
  for (int64_t block = taken.first; block < taken.first + taken.count; ++block) {
    if (record.is_ending()) break;
    if (!record.ledger.begin(block)) continue;
    const PullOutcome outcome = pull_block(*taken.task, block);
    if (!record.ledger.settle(block, outcome.code, outcome.error_number, outcome.checksum)) {
      continue;
    }
    ++settled;
    // Others learn of it through the ledger's release, which on_grain_ does.
    if (outcome.code != Code::kOk) record.has_failed.store(true, std::memory_order_relaxed);
    if (outcome.code == Code::kPeerLost) record.is_lost.store(true, std::memory_order_relaxed);
  }
  on_grain_(record, 1, settled);
}

// A task leaves the ring with its last grain, so that nothing keeps its memory held any longer.
Puller::Taken Puller::take(Ring::iterator place) {
  Taken taken{.task = *place};
  RemoteRecord& record = *taken.task->record;
  Ring left;  // never the last to go: `taken` has the task too
  if (!record.take(&taken.first, &taken.count)) taken.count = 0;
  const int64_t reached = record.cursor.load(std::memory_order_relaxed);
  if (reached >= record.ledger.blocks()) {
    leave(place, &left);
  } else {
    ring_.splice(ring_.end(), ring_, place);
  }
  return taken;
}

void Puller::leave(Ring::iterator place, Ring* left) {
  places_.erase((*place)->record.get());
  left->splice(left->end(), ring_, place);
}

void Puller::call_threads(int64_t wanted) {
  const int64_t woken = std::min<int64_t>(wanted, idle_);
  for (int64_t i = 0; i < woken; ++i) work_.notify_one();
  const auto begun = static_cast<int64_t>(pool_.size());
  const int64_t missing = std::min(wanted - woken, threads_ - begun);
  try {
    for (int64_t i = 0; i < missing; ++i) pool_.emplace_back([this] { run(); });
  } catch (const std::system_error&) {
    // No more threads for this process: those there are, helpers and the next call do it.
    return;
  }
}

}  // namespace kvx
