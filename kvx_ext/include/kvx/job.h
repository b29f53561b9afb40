// The shared handle of one batch: its state, its results, and ways to wait and to give up.
//
// A job ends twice. *Terminal*: its results are final and whoever waits goes on; this happens at
// the deadline at the latest. *Quiesced*: nothing reads or writes its memory any more; until then
// the memory is quarantined and must be neither reused nor freed. Mostly both come together.
//
// Its planes alone may be free before: they are *at rest* when the job is terminal and no copy from
// or to them is running. A disk that hangs for ever then keeps the slots, and nothing else.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "kvx/batch.h"

namespace kvx {

struct JobRecord;

enum class JobState : uint8_t {
  kRunning,
  kDone,      // every block is kOk
  kFailed,    // at least one block is not, or a sync failed
  kTimedOut,  // the deadline passed first
  kCancelled,
};
inline constexpr int kJobStates = 5;
[[nodiscard]] std::string_view job_state_name(JobState state);

// Reported by Job::codes() for a block whose outcome is still open; never after the end.
inline constexpr int32_t kUndecided = -1;

// Thread-safe, cheap to copy, and usable after its engine was closed.
class Job {
 public:
  explicit Job(std::shared_ptr<JobRecord> record) : record_(std::move(record)) {}

  uint64_t id() const;
  JobKind kind() const;
  JobState state() const;
  bool is_terminal() const { return state() != JobState::kRunning; }
  bool is_at_rest() const;
  bool is_quiesced() const;

  // True once terminal. The calling thread may do some of the job's copying meanwhile.
  bool wait(double timeout_s) const;
  bool wait_at_rest(double timeout_s) const;
  bool wait_quiesced(double timeout_s) const;

  // Ends the job as kCancelled and asks that its I/O be given up. True when this call did that,
  // false when the job had already ended (its state says how). Never blocks.
  bool cancel() const;

  int64_t blocks() const;
  int64_t bytes() const;        // of all blocks
  int64_t blocks_done() const;  // kOk so far
  int64_t bytes_done() const;
  int64_t latency_ns() const;  // from submission to the end, or to now

  // One entry a block. REQUIRES: the span has blocks() entries.
  void codes(std::span<int32_t> target) const;   // of Code, or kUndecided
  void errnos(std::span<int32_t> target) const;  // errno behind kStorage, CUresult behind kDevice
  void checksums(std::span<uint64_t> target) const;  // computed; 0 where no bytes were seen

  // Where the first failed sync of a kWrite job failed, else Ok.
  Status sync_status() const;

 private:
  std::shared_ptr<JobRecord> record_;
};

}  // namespace kvx
