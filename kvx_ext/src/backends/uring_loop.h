// The thread that owns a ring: takes mail from other threads, keeps the ring full, delivers.
//
// It sleeps inside io_uring_enter(); a poll on an eventfd is always in the ring, so mail wakes it.
// The kernel may keep the thread or its requests for ever, so close() can leave the loop behind: it
// is kept alive by its own thread until the last request has come back.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backends/sink_gate.h"
#include "backends/uring_buffers.h"
#include "backends/uring_ring.h"
#include "kvx/backend.h"

namespace kvx {

class UringLoop {
 public:
  UringLoop(std::unique_ptr<UringRing> ring, int wake_fd, int queue_depth, IoSink sink);
  ~UringLoop();
  UringLoop(const UringLoop&) = delete;
  UringLoop& operator=(const UringLoop&) = delete;

  // The thread's body; returns when close() was asked for and nothing is in flight.
  void run();

  void submit(std::span<const IoRequest> requests);
  void cancel(uint64_t token);
  // bytes == 0 unregisters. Requests submitted later see the change, waited for or not.
  std::future<Status> change_buffer(uint8_t* base, int64_t bytes);

  // Cancels everything; true when all came back in time and run() is about to return.
  bool close(std::chrono::steady_clock::time_point deadline);
  // REQUIRES: close() has returned. No completion is delivered after this.
  int64_t abandon();

 private:
  // A request on its way: cut into chunks, each of which is one Flight at a time.
  struct Operation {
    IoRequest request;
    int64_t launched = 0;  // bytes handed to flights
    int flights = 0;
    bool is_cancelled = false;
    Code code = Code::kOk;
    int error_number = 0;
  };
  struct Flight {
    Operation* operation = nullptr;
    int64_t offset = 0;  // in the request
    int64_t bytes = 0;
    int64_t done = 0;
    int retries = 0;
  };
  struct BufferChange {
    uint8_t* base;
    int64_t bytes;
    std::promise<Status> result;
  };
  struct Mail {
    std::vector<IoRequest> requests;
    std::vector<uint64_t> cancels;
    std::vector<BufferChange> changes;
  };

  // Both need mail_mutex_.
  bool has_mail() const;
  void wake();

  void read_mail();
  void deliver();
  bool try_finish();
  void accept(const IoRequest& request);
  void give_up(uint64_t token);
  void give_up_all();
  void launch();
  void launch_chunk(Operation& operation);
  bool issue(size_t flight);
  void arm_wake();
  void wait();
  void land(const io_uring_cqe& event);
  void settle(size_t flight, int32_t result);
  void finish_flight(size_t flight, Code code, int error_number);
  void finish(Operation& operation);

  const std::unique_ptr<UringRing> ring_;
  const int wake_fd_;
  SinkGate gate_;

  std::mutex mail_mutex_;
  Mail mail_;                // mail_mutex_
  bool is_asleep_ = false;   // mail_mutex_: in enter(), and nobody has woken it yet
  bool is_closing_ = false;  // mail_mutex_
  bool is_closed_ = false;   // mail_mutex_: mail is not read any more

  // Below: the loop's thread only.
  UringBuffers buffers_;
  Mail taken_;
  std::unordered_map<uint64_t, Operation> operations_;  // by token
  std::deque<Operation*> backlog_;                      // with bytes to launch
  std::vector<Flight> flights_;
  std::vector<size_t> free_flights_;
  std::deque<size_t> unissued_;  // flights that found the submission ring full
  std::vector<uint64_t> unsent_cancels_;
  std::vector<IoCompletion> completions_;
  bool is_wake_armed_ = false;
  bool was_told_to_close_ = false;
};

}  // namespace kvx
