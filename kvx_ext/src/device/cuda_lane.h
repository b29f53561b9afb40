// Copies of one direction: a stream of the highest priority, a thread that plans and submits, and a
// thread that waits for events and completes.
//
//   desk -> submitting: group, plan, driver, one event -> completing: event passed -> desk -> sink
//
// A group that the driver refused half of is completed only when the stream is known to be idle: a
// completion says that nothing moves any more.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "device/copy_desk.h"
#include "device/cuda_device.h"
#include "device/cuda_issue.h"
#include "device/cuda_staging.h"

namespace kvx {

class CudaLane {
 public:
  static Status create(std::shared_ptr<CudaDevice> device, CopyDirection direction,
                       std::shared_ptr<CopyDesk> desk, const CopyOptions& options,
                       std::shared_ptr<CudaLane>* lane);
  // REQUIRES: both threads have ended.
  ~CudaLane();
  CudaLane(const CudaLane&) = delete;
  CudaLane& operator=(const CudaLane&) = delete;

  // What the two threads run, until the desk closes.
  void run_submitting();
  void run_completing();
  // Lets the completing thread end although it does not know whether the stream is idle.
  void abandon() { is_abandoned_.store(true); }

  void add_stats(CopyStats* total) const;

 private:
  // Few enough that cancelling still reaches most of a long queue.
  static constexpr size_t kGroupsInDriverMax = 8;

  struct Group {
    std::vector<CopyCompletion> completions;
    PooledEvent event;  // after the last copy; where nothing failed
    cuda::Result failed = cuda::kSuccess;
    bool may_move = false;  // something of it was given to the driver

    void fail(Code code, cuda::Result result);
  };

  CudaLane(std::shared_ptr<CudaDevice> device, CopyDirection direction,
           std::shared_ptr<CopyDesk> desk, const CopyOptions& options, cuda::Stream stream);

  void submit_group(std::vector<CopyRequest>* requests, Group* group);
  cuda::Result hand_over(const std::vector<CopyRequest>& requests, Group* group);
  cuda::Result hand_over_runs(const CopyRuns& runs, bool is_pinned, bool has_mark);
  cuda::Result issue_staged(const CopyCall& call);
  void sort_runs(const std::vector<CopyRequest>& requests);
  void wait_for_room();
  bool next_group(Group** group);
  void wait_for(Group* group);
  cuda::Result wait_for_event(cuda::Event event);
  void quiesce();

  const std::shared_ptr<CudaDevice> device_;
  CudaContext& context_;
  const CopyDirection direction_;
  const std::shared_ptr<CopyDesk> desk_;
  const CopyOptions options_;
  const cuda::Stream stream_;
  std::atomic<bool> is_abandoned_{false};

  // Of the submitting thread.
  CudaIssuer issuer_;
  std::unique_ptr<CudaStaging> staging_;  // null: no kernels
  bool has_staged_ = false;               // the group at hand
  std::shared_ptr<const PinnedView> pinned_;
  CopyRuns pinned_runs_;
  CopyRuns pageable_runs_;
  CopyPlan plan_;
  CopyStats fresh_;  // of the group at hand

  mutable std::mutex mutex_;
  std::condition_variable news_;  // a group, or no more groups
  std::condition_variable room_;
  std::deque<Group> groups_;  // mutex_; the front one is being waited for
  bool is_at_end_ = false;    // mutex_
  CopyStats stats_;           // mutex_
};

}  // namespace kvx
