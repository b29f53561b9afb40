#include "device/copy_desk.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace kvx {

namespace {

bool is_well_formed(const CopyRequest& request) {
  const CopyRuns& runs = request.runs;
  return static_cast<size_t>(request.direction) < kCopyDirections &&
         runs.targets.size() == runs.size() && runs.sources.size() == runs.size();
}

}  // namespace

CopyDesk::~CopyDesk() {
  // Only where start() succeeded and the backend did not: nobody had the desk yet.
  if (courier_.joinable()) (void)shut();
}

void CopyDesk::start() {
  courier_ = std::thread([shared = shared_] { run_courier(shared); });
}

void CopyDesk::run_courier(const std::shared_ptr<Shared>& shared) {
  std::unique_lock lock(shared->mutex);
  std::vector<CopyCompletion> completions;
  while (true) {
    shared->news.wait(lock, [&] { return !shared->given_up.empty() || shared->is_closed; });
    if (shared->given_up.empty()) return;
    completions.swap(shared->given_up);
    lock.unlock();
    shared->gate.deliver(completions);
    completions.clear();
    lock.lock();
  }
}

void CopyDesk::submit(CopyRequest request) {
  std::unique_lock lock(shared_->mutex);
  if (shared_->is_closed) {
    lock.unlock();
    shared_->gate.refuse(std::span<const CopyRequest>(&request, 1));
    return;
  }
  shared_->gate.expect(1);
  if (shared_->is_closing || !is_well_formed(request)) {
    const Code code = shared_->is_closing ? Code::kCancelled : Code::kUsage;
    shared_->given_up.push_back({request.token, code, 0});
    shared_->news.notify_one();
    return;
  }
  Lane& lane = shared_->lanes[static_cast<size_t>(request.direction)];
  lane.queue.push_back(std::move(request));
  lane.work.notify_one();
}

void CopyDesk::cancel(uint64_t token) {
  CopyRequest cancelled;  // freed without the lock
  std::lock_guard lock(shared_->mutex);
  for (Lane& lane : shared_->lanes) {
    const auto queued = std::find_if(lane.queue.begin(), lane.queue.end(),
                                     [&](const CopyRequest& r) { return r.token == token; });
    if (queued == lane.queue.end()) continue;
    cancelled = std::move(*queued);
    lane.queue.erase(queued);
    shared_->given_up.push_back({token, Code::kCancelled, 0});
    shared_->news.notify_one();
    return;
  }
}

size_t CopyDesk::bytes_of(const CopyRequest& request) {
  return std::accumulate(request.runs.bytes.begin(), request.runs.bytes.end(), size_t{0});
}

bool CopyDesk::take(CopyDirection direction, std::vector<CopyRequest>* group) {
  group->clear();
  Lane& lane = shared_->lanes[static_cast<size_t>(direction)];
  std::unique_lock lock(shared_->mutex);
  lane.work.wait(lock, [&] { return !lane.queue.empty() || shared_->is_closing; });
  size_t bytes = 0;
  size_t runs = 0;
  while (!lane.queue.empty()) {
    CopyRequest& next = lane.queue.front();
    bytes += bytes_of(next);
    runs += next.runs.size();
    const bool fits = bytes <= kGroupBytesMax && runs <= kGroupRunsMax &&
                      (group->empty() || next.after == group->front().after);
    if (!group->empty() && !fits) break;
    group->push_back(std::move(next));
    lane.queue.pop_front();
  }
  return !group->empty();
}

bool CopyDesk::drain(TimePoint deadline) {
  std::array<std::deque<CopyRequest>, kCopyDirections> cancelled;  // freed without the lock
  {
    std::lock_guard lock(shared_->mutex);
    shared_->is_closing = true;
    for (size_t i = 0; i < kCopyDirections; ++i) {
      Lane& lane = shared_->lanes[i];
      for (const CopyRequest& request : lane.queue) {
        shared_->given_up.push_back({request.token, Code::kCancelled, 0});
      }
      cancelled[i].swap(lane.queue);
      lane.work.notify_all();
    }
    shared_->news.notify_all();
  }
  return shared_->gate.wait_drained(deadline);
}

int64_t CopyDesk::shut() {
  {
    std::lock_guard lock(shared_->mutex);
    shared_->is_closing = true;
    shared_->is_closed = true;
    for (Lane& lane : shared_->lanes) lane.work.notify_all();
  }
  shared_->news.notify_all();
  if (courier_.joinable()) courier_.join();
  return shared_->gate.shut();
}

}  // namespace kvx
