// Streams with a worker thread each, the operations in their queues, and events. All guarded by
// Simulation::mutex, which a worker lets go of while bytes move.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "clock.h"
#include "devices.h"
#include "faults.h"

namespace kvx::sim {

class Call;
struct Simulation;
struct StreamState;

// Threads of a process are bounded, and so are streams.
inline constexpr size_t kStreamsMax = 128;

// A range that an operation touches, as far as that is known before it runs.
struct Touched {
  uint64_t address = 0;
  uint64_t bytes = 0;
};

struct Operation {
  Label label;
  uint64_t epoch = 0;
  VectorClock host_clock;  // the host's when it was enqueued
  std::vector<Touched> touched;
  bool is_kernel = false;         // touches what only running it shows
  bool is_run_when_lost = false;  // somebody waits for it, even when the context is lost
  std::function<void(std::unique_lock<std::mutex>&, StreamState&, const Operation&)> run;
};

struct StreamState {
  uint64_t id = 0;  // as convictions name it
  Device* device = nullptr;
  size_t owner = 0;  // in vector clocks
  uint64_t next_epoch = 1;

  // The front one is running. Elements of a deque stay where they are when others are added.
  std::deque<Operation> queue;
  uint64_t enqueued = 0;
  uint64_t completed = 0;
  VectorClock clock;            // of the operation that runs or ran last
  VectorClock completed_clock;  // of the last one that ended
  bool is_stopping = false;     // ends when its queue is empty
  bool is_ended = false;
  std::condition_variable work;
  std::thread thread;
};

// One recording of an event.
struct Recording {
  bool is_done = false;
  VectorClock clock;
  std::chrono::steady_clock::time_point when;
};

// What processes share of an interprocess event, in a memfd.
struct SharedEvent {
  struct Words {
    std::atomic<uint64_t> begun;  // recordings asked for
    std::atomic<uint64_t> ended;  // the last one that is done
  };

  SharedEvent(int fd_, Words* words_) : fd(fd_), words(words_) {}
  ~SharedEvent();
  SharedEvent(const SharedEvent&) = delete;
  SharedEvent& operator=(const SharedEvent&) = delete;

  // With the words of a memfd of another process, or of a new one for -1; null when that fails.
  static std::shared_ptr<SharedEvent> create(int fd);

  int fd;
  Words* words;
};

struct EventState {
  uint64_t id = 0;
  Device* device = nullptr;
  unsigned flags = 0;
  std::shared_ptr<Recording> last;  // null: never recorded
  std::shared_ptr<SharedEvent> shared;
};

class Streams {
 public:
  // Null when there are too many already.
  std::shared_ptr<StreamState> create(Simulation& sim, Device& device);
  // The stream of a handle; null when there is none. A NULL stream is a conviction, and works.
  std::shared_ptr<StreamState> find(Call& call, cuda::Stream handle);
  // Lets go of the stream; what is queued still runs. Joins threads that have ended.
  void destroy(Simulation& sim, cuda::Stream handle, std::unique_lock<std::mutex>& lock);
  // Ends all streams; REQUIRES Simulation::is_abandoning, so that nothing waits for ever.
  void reset(Simulation& sim, std::unique_lock<std::mutex>& lock);

  // Queues an operation. The returned one stays valid while the lock is held.
  Operation& enqueue(Simulation& sim, StreamState& stream, Operation operation);

  // Blocks until nothing queued or running touches the range; true when something did.
  bool wait_until_untouched(Simulation& sim, std::unique_lock<std::mutex>& lock, uint64_t address,
                            uint64_t bytes);

  [[nodiscard]] uint64_t live_streams() const { return live_.size(); }

  std::map<uint64_t, std::shared_ptr<EventState>> events;
  std::shared_ptr<EventState> create_event(Device& device, unsigned flags);
  [[nodiscard]] std::shared_ptr<EventState> find(cuda::Event handle) const;

 private:
  std::shared_ptr<StreamState> start(Simulation& sim, Device& device);
  void reap(std::unique_lock<std::mutex>& lock);
  void forget_old(Simulation& sim);

  uint64_t next_id_ = 1;
  uint64_t next_event_ = 1;
  uint64_t next_operation_ = 1;
  std::map<uint64_t, std::shared_ptr<StreamState>> live_;
  // Every stream whose thread has not been joined: live, destroyed, and the NULL streams.
  std::vector<std::shared_ptr<StreamState>> all_;
};

// Whether operations of the stream have no effect any more.
bool is_lost(const Simulation& sim, const StreamState& stream);

// Lets go of the lock for a moment, as who polls memory must; the pauses grow to a millisecond.
void pause(std::unique_lock<std::mutex>& lock, std::chrono::microseconds* length);

uint64_t stream_number(uint64_t id);
uint64_t event_number(uint64_t id);

}  // namespace kvx::sim
