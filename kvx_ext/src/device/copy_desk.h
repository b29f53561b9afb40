// Where requests for copies are handed in: a queue for each direction, which the lanes take from,
// and the way back to the caller. The CUDA device and the emulation share it.
//
// Lanes may be stuck in a driver for good, so what was cancelled in a queue is delivered by a
// thread of the desk. Everything lives in shared pointers: close() may leave lanes behind.
#pragma once

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "backends/sink_gate.h"
#include "clock.h"
#include "kvx/device.h"

namespace kvx {

// What is planned and submitted together, and completes together.
inline constexpr size_t kGroupBytesMax = size_t{32} << 20;
inline constexpr size_t kGroupRunsMax = 8192;

// Thread-safe, but for close(), which one thread calls once.
class CopyDesk {
 public:
  explicit CopyDesk(CopySink sink) : shared_(std::make_shared<Shared>(std::move(sink))) {}
  ~CopyDesk();
  CopyDesk(const CopyDesk&) = delete;
  CopyDesk& operator=(const CopyDesk&) = delete;

  void start();  // throws std::system_error when there is no thread to be had

  void submit(CopyRequest request);
  void cancel(uint64_t token);

  // Waits for requests and takes those that belong together: the same mark, or none, up to the
  // group's limits; at least one. False: the desk is closing and there will be none.
  bool take(CopyDirection direction, std::vector<CopyRequest>* group);
  void deliver(std::span<const CopyCompletion> completions) { shared_->gate.deliver(completions); }
  int64_t in_flight() const { return shared_->gate.owed(); }

  // Cancels what is queued and waits until nothing is owed, at most until `deadline`. True: nothing
  // is; the lanes are about to end.
  bool drain(TimePoint deadline);
  // After drain(): stops the desk's thread and shuts the sink off. Returns what is still owed.
  int64_t shut();

 private:
  struct Lane {
    std::deque<CopyRequest> queue;
    std::condition_variable work;
  };

  struct Shared {
    explicit Shared(CopySink sink) : gate(std::move(sink)) {}

    SinkGateOf<CopyCompletion> gate;
    std::mutex mutex;
    std::condition_variable news;
    std::array<Lane, kCopyDirections> lanes;  // mutex
    std::vector<CopyCompletion> given_up;     // mutex; never started
    bool is_closing = false;                  // mutex
    bool is_closed = false;                   // mutex
  };

  static void run_courier(const std::shared_ptr<Shared>& shared);
  static size_t bytes_of(const CopyRequest& request);

  const std::shared_ptr<Shared> shared_;
  std::thread courier_;
};

}  // namespace kvx
