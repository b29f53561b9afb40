// Copies blocks out of memory on the same host: mapped, of this process, or of a foreign one.
//
// Whoever owns the target runs it: the initiator of a read, the receiver of a write. Each block is
// copied row by row with its checksum in the same pass, between two looks at the lease; a block
// that fails its checksum or whose lease ended meanwhile is poisoned and never counted as arrived.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
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

// Copies one block on the calling thread. Pure but for the memory it names.
[[nodiscard]] PullOutcome pull_block(const PullTask& task, int64_t block);

// The copy threads of an agent. Tasks stand in a ring; whoever is free takes a grain of the first.
class Puller {
 public:
  // Told what was decided: `holds` given back and `settled` blocks; see RemoteRecord::ledger.
  using OnGrain = std::function<void(RemoteRecord& record, int64_t holds, int64_t settled)>;

  ~Puller();
  // Starts the threads with the first task. `owner` is kept alive by them.
  void start(int threads, OnGrain on_grain);
  void submit(std::shared_ptr<PullTask> task);
  // Copies a grain of this record on the calling thread; false when there is none left to take.
  bool help(RemoteRecord& record);
  void stop();

 private:
  void run();
  void run_grain(PullTask& task, int64_t first, int64_t count);
  std::shared_ptr<PullTask> take_next(int64_t* first, int64_t* count);

  OnGrain on_grain_;
  int threads_ = 0;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::shared_ptr<PullTask>> ring_;  // mutex_
  std::vector<std::thread> pool_;               // mutex_
  int idle_ = 0;                                // mutex_
  bool is_stopping_ = false;                    // mutex_
};

}  // namespace kvx
