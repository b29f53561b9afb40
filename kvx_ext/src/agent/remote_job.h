// One read or write between this agent and a peer: its plan, its outcome, and who waits for it.
//
// It ends like the engine's jobs (kvx/job.h): *terminal* at its deadline at the latest, *quiesced*
// when nothing of ours touches its local memory any more and, for a write, the peer has confirmed
// that it has stopped or is gone. Until then it stands in the agent's quarantine.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "clock.h"
#include "kvx/agent.h"
#include "kvx/descriptor.h"
#include "kvx/exposed_region.h"
#include "kvx/lease_table.h"
#include "ledger.h"

namespace kvx {

class Connection;

// A transfer may go over several connections; on each its number has these many bits of which.
inline constexpr uint64_t kPartBits = 8;

struct RemoteRecord : std::enable_shared_from_this<RemoteRecord> {
  RemoteRecord(uint64_t record_id, bool writes, std::shared_ptr<const RemotePlan> its_plan,
               TimePoint its_deadline);

  // The next blocks for a copy thread; false when none are left.
  bool take(int64_t* first, int64_t* count);

  bool is_ending() const { return is_claimed.load(std::memory_order_acquire); }
  bool is_terminal() const { return state.load(std::memory_order_acquire) != JobState::kRunning; }

  int64_t bytes_of(int64_t block) const { return plan->local[static_cast<size_t>(block)].total(); }
  const uint8_t* key_of(int64_t block) const;

  const uint64_t id;
  const bool is_write;
  uint64_t peer = 0;  // these are set before anybody else sees the record
  RegionHold region;  // of plan->local; given back when the record quiesces
  std::vector<uint8_t> note;
  std::function<void()> on_quiesced;  // outside of all locks; may be empty
  std::vector<std::weak_ptr<Connection>> connections;
  bool is_served = false;  // on behalf of a peer: a write that this agent copies
  uint64_t own_lease = 0;  // a write that the peer copies: on our side, for as long as it lasts

  const std::shared_ptr<const RemotePlan> plan;
  const TimePoint begun_at;
  const TimePoint deadline;
  const int64_t grain_blocks;

  Ledger ledger;
  std::atomic<int64_t> cursor{0};
  std::atomic<bool> has_failed{false};
  std::atomic<bool> is_lost{false};  // the peer went before the end
  std::atomic<bool> is_claimed{false};
  std::atomic<JobState> state{JobState::kRunning};
  std::atomic<bool> is_quiesced{false};
  std::atomic<bool> is_watched{false};    // its end is an event
  std::atomic<bool> is_cancelled{false};  // a write: its receiver was asked to stop
  int waker = -1;                         // mutex: eventfd of a thread that receives while it waits
  std::atomic<int64_t> latency_ns{0};

  std::atomic<bool> is_told_end{false};    // tell() has done what the end brings
  std::atomic<bool> is_told_quiet{false};  // and what the quiescing does
  bool was_quarantined = false;            // mutex

  std::mutex mutex;  // orders the two ends
  std::condition_variable ended;
};

}  // namespace kvx
