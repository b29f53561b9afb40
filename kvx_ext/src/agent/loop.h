// One thread that waits for sockets and timers on behalf of connections.
//
// It never blocks on anything else, and holds no lock while it calls out.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "agent/stream.h"
#include "clock.h"
#include "kvx/status.h"

namespace kvx {

class Watched {
 public:
  virtual ~Watched() = default;
  // `events` of epoll(7). On the loop's thread.
  virtual void on_ready(uint32_t events) = 0;
};

class Loop {
 public:
  Loop() = default;
  ~Loop();
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  Status start();
  // Ends the thread; nothing is called after that. Not from its own thread.
  void stop();

  // Both from any thread. The loop keeps what it watches until it is forgotten.
  Status watch(uint64_t id, int fd, uint32_t events, std::shared_ptr<Watched> watched);
  void change(uint64_t id, int fd, uint32_t events);
  void forget(uint64_t id, int fd);

  // Looks for what comes next for a moment instead of sleeping at once, yielding to whoever wants
  // to run: waking up takes longer than a small answer. On the loop's thread, or before it sleeps.
  void stay_awake();

  // Runs `action` on the loop's thread at `at`, or as soon as possible after it.
  void call_at(TimePoint at, std::function<void()> action);

 private:
  void run();
  int timeout_ms();
  void run_timers();
  void wake();

  UniqueFd epoll_;
  UniqueFd waker_;
  std::thread thread_;
  std::atomic<bool> is_stopping_{false};
  std::atomic<int64_t> awake_until_ns_{0};
  std::mutex mutex_;
  std::unordered_map<uint64_t, std::shared_ptr<Watched>> watched_;  // mutex_
  std::multimap<TimePoint, std::function<void()>> timers_;          // mutex_
  TimePoint alarm_ = TimePoint::min();  // mutex_: what the thread sleeps until
};

}  // namespace kvx
