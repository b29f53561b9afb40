#include "agent/loop.h"

#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

namespace kvx {

namespace {

constexpr uint64_t kWakerId = 0;
constexpr int kEventsAtOnce = 64;
constexpr int64_t kAwakeNs = 50'000;

int64_t now_ns() { return Clock::now().time_since_epoch().count(); }

}  // namespace

Loop::~Loop() { stop(); }

Status Loop::start() {
  epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  waker_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll_ || !waker_) {
    return {Code::kUnavailable, std::string("epoll or eventfd: ") + std::strerror(errno), errno};
  }
  epoll_event event{.events = EPOLLIN, .data = {.u64 = kWakerId}};
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, waker_.get(), &event) != 0) {
    return {Code::kUnavailable, std::string("epoll_ctl: ") + std::strerror(errno), errno};
  }
  thread_ = std::thread([this] { run(); });
  return Status::Ok();
}

void Loop::stop() {
  is_stopping_.store(true);
  if (thread_.joinable()) {
    wake();
    thread_.join();
  }
  // What is watched may hold the last reference to what holds us: let go outside of the lock.
  std::unordered_map<uint64_t, std::shared_ptr<Watched>> watched;
  std::multimap<TimePoint, std::function<void()>> timers;
  std::lock_guard lock(mutex_);
  watched.swap(watched_);
  timers.swap(timers_);
  // Whoever still holds a closed agent holds no descriptors.
  epoll_.reset();
  waker_.reset();
}

Status Loop::watch(uint64_t id, int fd, uint32_t events, std::shared_ptr<Watched> watched) {
  std::lock_guard lock(mutex_);
  epoll_event event{.events = events, .data = {.u64 = id}};
  if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) {
    return {Code::kUnavailable, std::string("epoll_ctl: ") + std::strerror(errno), errno};
  }
  watched_[id] = std::move(watched);
  return Status::Ok();
}

void Loop::change(uint64_t id, int fd, uint32_t events) {
  std::lock_guard lock(mutex_);
  epoll_event event{.events = events, .data = {.u64 = id}};
  // Fails only for what was forgotten meanwhile.
  (void)epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
}

void Loop::forget(uint64_t id, int fd) {
  std::shared_ptr<Watched> last;
  std::lock_guard lock(mutex_);
  (void)epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  const auto found = watched_.find(id);
  if (found == watched_.end()) return;
  last = std::move(found->second);
  watched_.erase(found);
}

void Loop::call_at(TimePoint at, std::function<void()> action) {
  bool is_sooner;
  {
    std::lock_guard lock(mutex_);
    timers_.emplace(at, std::move(action));
    is_sooner = at < alarm_;
  }
  if (is_sooner) wake();
}

void Loop::wake() {
  std::lock_guard lock(mutex_);
  const uint64_t one = 1;
  // Full means that it is readable, which is all we want.
  (void)!write(waker_.get(), &one, sizeof(one));
}

void Loop::stay_awake() { awake_until_ns_.store(now_ns() + kAwakeNs, std::memory_order_relaxed); }

int Loop::timeout_ms() {
  std::lock_guard lock(mutex_);
  if (timers_.empty()) {
    alarm_ = TimePoint::max();
    return -1;
  }
  alarm_ = timers_.begin()->first;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(alarm_ - Clock::now()).count();
  return static_cast<int>(std::clamp<int64_t>(left, 0, 60'000));
}

void Loop::run() {
  std::array<epoll_event, kEventsAtOnce> events;
  while (!is_stopping_.load()) {
    int ready = 0;
    while (now_ns() < awake_until_ns_.load(std::memory_order_relaxed)) {
      ready = epoll_wait(epoll_.get(), events.data(), kEventsAtOnce, 0);
      if (ready != 0) break;
      sched_yield();
    }
    if (ready == 0) ready = epoll_wait(epoll_.get(), events.data(), kEventsAtOnce, timeout_ms());
    for (int i = 0; i < ready; ++i) {
      const epoll_event& event = events[static_cast<size_t>(i)];
      if (event.data.u64 == kWakerId) {
        uint64_t count;
        (void)!read(waker_.get(), &count, sizeof(count));
        continue;
      }
      std::shared_ptr<Watched> watched;
      {
        std::lock_guard lock(mutex_);
        const auto found = watched_.find(event.data.u64);
        if (found != watched_.end()) watched = found->second;
      }
      if (watched != nullptr) watched->on_ready(event.events);
    }
    run_timers();
  }
}

void Loop::run_timers() {
  std::vector<std::function<void()>> due;
  {
    std::lock_guard lock(mutex_);
    const auto end = timers_.upper_bound(Clock::now());
    for (auto at = timers_.begin(); at != end; ++at) due.push_back(std::move(at->second));
    timers_.erase(timers_.begin(), end);
  }
  for (const auto& action : due) action();
}

}  // namespace kvx
