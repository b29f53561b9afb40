// The engine without its doors: how jobs begin, move through their stages, and end.
//
// Owned by the engine, by its threads and by every job that is not quiesced, so that a thread stuck
// at close() finds everything it needs for as long as it is stuck.
//
// A job ends once: whoever claims it (the last block, the deadline, cancel(), close()) decides the
// blocks that are left, then announces it. Lock order: a job's mutex, then any one of table, pool
// and queue.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <thread>

#include "canceller.h"
#include "copy_faults.h"
#include "counters.h"
#include "job_record.h"
#include "job_table.h"
#include "kvx/backend.h"
#include "kvx/device.h"
#include "kvx/engine.h"
#include "worker_pool.h"

namespace kvx {

class EngineCore : public std::enable_shared_from_this<EngineCore> {
 public:
  Status start(const EngineOptions& options, std::string* backend_reason);
  Status submit(Batch batch, double deadline_s, std::shared_ptr<JobRecord>* job);
  CloseReport close(double timeout_s);

  // Ends a running job before its time; false when it had ended. Asks that its I/O be given up.
  bool end_early(JobRecord& job, JobState state);
  // Lets a waiting thread copy a grain of its own job; false when it had better sleep.
  bool help(JobRecord& job);

  // Gives the engine a device, once, before any job needs it.
  Status attach_device(std::shared_ptr<Device> device, const CopyOptions& options);
  Device* device() const { return device_.get(); }
  bool has_device() const { return copies_ != nullptr; }
  CopyStats copy_stats() const { return copies_ != nullptr ? copies_->stats() : CopyStats{}; }

  EngineStats stats() const;
  IoBackend& backend() { return *backend_; }
  CompletionQueue& completions() { return completions_; }
  bool is_closed() const { return table_.is_closed(); }

 private:
  // engine_core.cpp: ends
  void run_reactor();
  void settle_balance(JobRecord& job, Balance balance);
  void end(JobRecord& job, JobState state);
  void quiesce(JobRecord& job);
  // Takes a hold, and the gate where the copies are `of_planes`. False: the job has ended.
  bool begin_copies(JobRecord& job, bool of_planes);
  // Gives the gate back, not the hold. REQUIRES: the caller keeps the job alive.
  void end_copies(JobRecord& job, bool of_planes);

  // engine_copy.cpp
  void run_grain(JobRecord& job, const Grain& grain);

  // engine_device.cpp
  void submit_copies(JobRecord& job);
  CopyGroup* add_group(JobRecord& job, std::vector<int32_t> blocks);
  // Of a layered job: `blocks` may be sent, `refused` more never will be. The last ones begin it.
  void collect_verified(JobRecord& job, const std::vector<int32_t>& blocks, int64_t refused);
  void send_layers(JobRecord& job);
  void send_group(JobRecord& job, CopyGroup& group, int first_plane, int planes);
  void on_copies(std::span<const CopyCompletion> completions);
  int64_t settle_group(JobRecord& job, const CopyGroup& group, const CopyCompletion& completion);
  void note_slots(const JobRecord& job, std::span<const int32_t> blocks, bool is_write) const;

  // engine_io.cpp
  void submit_io(JobRecord& job);
  void send(JobRecord& job, std::span<const IoRequest> requests);
  void submit_syncs(JobRecord& job);
  void on_completions(std::span<const IoCompletion> completions);
  int64_t on_read(JobRecord& job, int64_t block, const IoCompletion& completion, bool* is_ready);
  int64_t on_write(JobRecord& job, int64_t block, const IoCompletion& completion);
  int64_t on_sync(JobRecord& job, int64_t sync, const IoCompletion& completion);
  // Decides a block, counts it, and returns 1 unless it was decided before.
  int64_t settle_io(JobRecord& job, int64_t block, const IoCompletion& completion);

  JobTable table_;
  WorkerPool pool_;
  Canceller canceller_;
  CompletionQueue completions_;
  Counters counters_;
  std::shared_ptr<CopyFaults> copy_faults_;  // null: none
  std::unique_ptr<IoBackend> backend_;
  std::shared_ptr<Device> device_;       // null: none
  std::unique_ptr<CopyBackend> copies_;  // null: none
  std::thread reactor_;                  // deadlines
  std::atomic<uint64_t> next_id_{1};
  std::mutex close_mutex_;
  bool is_shut_ = false;      // close_mutex_
  CloseReport close_report_;  // close_mutex_
};

}  // namespace kvx
