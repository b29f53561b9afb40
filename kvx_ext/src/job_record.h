// Everything the engine knows about one job; kvx::Job is the handle that others see.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "clock.h"
#include "kvx/batch.h"
#include "kvx/job.h"
#include "ledger.h"
#include "planes_gate.h"

namespace kvx {

class EngineCore;

// Blocks that a worker takes at once: positions [first, first + count) of the job's order.
struct Grain {
  int64_t first = 0;
  int64_t count = 0;
};

struct Totals {
  int64_t blocks = 0;
  int64_t bytes = 0;
};

// One request in the backend; its address is the token. Lives as long as the job, and the job as
// long as it has holds, so a completion always finds it.
struct IoSlot {
  JobRecord* job = nullptr;
  int32_t index = 0;  // a block, or the number of blocks plus that of a sync
  std::atomic<bool> is_in_flight{false};
};

// One request in the copy backend; its address is the token. Lives as long as the job.
struct CopyGroup {
  JobRecord* job = nullptr;
  std::vector<int32_t> blocks;
  int layers_done = 0;  // of a layered job, once it has arrived
  bool settles = true;  // false: more of these blocks is to come
  std::atomic<bool> is_in_flight{false};
};

struct JobRecord : std::enable_shared_from_this<JobRecord> {
  JobRecord(uint64_t job_id, Batch job_batch, TimePoint job_deadline);

  // Blocks become ready for the copy threads in any order, each at most once. A job without I/O has
  // all of them ready at its start, in their own order. The lock keeps publishers apart.
  void publish_ready(const std::vector<int32_t>& ready);
  void publish_all() { ready_end.store(batch.blocks(), std::memory_order_release); }
  bool has_ready() const {
    return cursor.load(std::memory_order_relaxed) < ready_end.load(std::memory_order_acquire);
  }
  int64_t ready_grains() const;
  bool take(Grain* grain);
  int64_t ready_block(int64_t position) const {
    return order.empty() ? position : order[static_cast<size_t>(position)];
  }

  // What is kOk so far. Walks the blocks unless all are.
  Totals done() const;
  bool is_synced(int32_t fd) const;

  bool is_ending() const { return is_claimed.load(std::memory_order_acquire); }
  bool is_terminal() const { return state.load(std::memory_order_acquire) != JobState::kRunning; }

  const uint64_t id;
  const Batch batch;
  const TimePoint begun_at;
  const TimePoint deadline;
  const int64_t total_bytes;
  const int64_t grain_blocks;
  std::shared_ptr<EngineCore> core;  // a cycle that ends with the engine's entry for this job

  Ledger ledger;
  PlanesGate planes_gate;
  std::atomic<bool> is_claimed{false};  // by the one who ends the job
  std::atomic<JobState> state{JobState::kRunning};
  std::atomic<bool> is_quiesced{false};
  std::atomic<int64_t> latency_ns{0};  // once terminal
  std::atomic<bool> has_failed{false};

  std::atomic<int64_t> cursor{0};
  std::atomic<int64_t> ready_end{0};
  std::vector<int32_t> order;  // begun elsewhere: [0, ready_end) is published
  std::mutex order_mutex;
  bool is_queued = false;  // guarded by the worker pool

  std::mutex groups_mutex;
  std::deque<CopyGroup> groups;   // groups_mutex; entries never move
  std::vector<int32_t> verified;  // groups_mutex; layered: blocks that may be sent
  int64_t unverified;             // groups_mutex; layered: blocks not looked at yet

  std::vector<IoSlot> slots;  // kRead, kWrite: one a block, then one a sync
  std::atomic<int64_t> writes_left{0};
  std::vector<int32_t> synced_fds;  // sorted; kWrite: a block of theirs is decided by its sync
  std::atomic<int32_t> sync_errno{0};
  std::atomic<int32_t> sync_code{0};

  std::mutex mutex;  // orders the two ends of the job; taken before any of the engine's
  std::condition_variable ended;
};

}  // namespace kvx
