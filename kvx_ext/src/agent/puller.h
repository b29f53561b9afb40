// Copies blocks out of memory on the same host: mapped, of this process, or of a foreign one.
//
// Whoever owns the target runs it: the initiator of a read, the receiver of a write. Each block is
// copied row by row with its checksum in the same pass, between two looks at the lease; a block
// that fails its checksum or whose lease ended meanwhile is poisoned and never counted as arrived.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "agent/remote_job.h"
#include "clock.h"
#include "kvx/lease_table.h"

namespace kvx {

// Where the bytes of a region can be read.
struct PullSource {
  const uint8_t* mapped = nullptr;  // of this process, or mapped from a peer; null: foreign
  pid_t pid = 0;                    // foreign: read with process_vm_readv
  uint64_t foreign_base = 0;
  std::shared_ptr<void> keep;  // the mapping
};

struct PullTask {
  std::shared_ptr<RemoteRecord> record;  // plan->local is written, plan->remote read
  PullSource source;
  std::shared_ptr<const LeaseView> leases;  // of the peer that owns the source
  uint32_t lease_slot = 0;
  uint64_t lease_generation = 0;
  // Whether the peer is still the process it was; asked before and after a foreign read.
  std::function<bool()> is_peer_there;
  // Another reason to write no more: the lease on our own memory, for a peer's write. May be empty.
  std::function<bool()> may_write;
};

struct PullOutcome {
  Code code = Code::kOk;
  int error_number = 0;
  uint64_t checksum = 0;
};

// Copies one block on the calling thread. Pure but for the memory it names. REQUIRES: the remote
// blocks lie within the source. kStale: the lease ended, or may_write said no; kPeerLost: the owner
// of foreign memory is gone; kUnavailable: this system does not let us read it; kCorrupt: not the
// expected checksum; kCancelled: the transfer ended meanwhile.
[[nodiscard]] PullOutcome pull_block(const PullTask& task, int64_t block);

// The copy threads of an agent. Tasks stand in a ring; whoever is free takes a grain of the first
// and sends it to the back. At most `threads` threads copy at once, those that help() included.
class Puller {
 public:
  // Told what was decided: `holds` to be given back and `settled` blocks; see RemoteRecord::ledger.
  // Called without locks, on whichever thread copied.
  using OnGrain = std::function<void(RemoteRecord& record, int64_t holds, int64_t settled)>;

  ~Puller() { stop(); }
  // Threads begin with the first task that wants them. `on_grain` must keep working until stop().
  void start(int threads, OnGrain on_grain);
  // One task a record. Without `wakes` no thread is bothered: the caller is about to help(), and
  // calls wake() if it leaves before help() has returned false. Dropped once stopped.
  void submit(std::shared_ptr<PullTask> task, bool wakes);
  // Lets the threads see what was submitted without `wakes`.
  void wake();
  // Copies a grain of this record on the calling thread; false when there is none left to take, or
  // as many as may are copying already, who will take it.
  bool help(RemoteRecord& record);
  // Lets go of a record that ended before all of it was taken.
  void forget(const RemoteRecord& record);
  // Ends the threads after their grains, and waits for helpers. REQUIRES: not called by on_grain.
  void stop();

  int64_t queued() const;
  int threads_begun() const;

 private:
  using Ring = std::list<std::shared_ptr<PullTask>>;
  struct Taken {
    std::shared_ptr<PullTask> task;
    int64_t first = 0;
    int64_t count = 0;
  };

  void run();
  void run_grain(const Taken& taken);
  // These REQUIRE mutex_.
  Taken take(Ring::iterator place);
  void leave(Ring::iterator place, Ring* left);
  void call_threads(int64_t wanted);

  OnGrain on_grain_;
  int threads_ = 0;
  mutable std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable helped_;
  Ring ring_;                                                       // mutex_
  std::unordered_map<const RemoteRecord*, Ring::iterator> places_;  // mutex_: in the ring
  std::vector<std::thread> pool_;                                   // mutex_
  int idle_ = 0;                                                    // mutex_
  int copying_ = 0;                                                 // mutex_
  int helping_ = 0;                                                 // mutex_
  bool is_stopping_ = false;                                        // mutex_
};

}  // namespace kvx
