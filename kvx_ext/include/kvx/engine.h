// The transfer engine: batches of blocks that stream between engine planes, host slots, device
// slots and files.
//
//   std::unique_ptr<Engine> engine;
//   Status status = Engine::create(options, &engine);
//   Batch batch{.kind = JobKind::kCopyIn, ...};
//   std::shared_ptr<Job> job;
//   status = engine->submit(std::move(batch), /*deadline_s=*/1.0, &job);
//   job->wait(2.0);            // or next_completions() on a thread of your own, or fileno()
//
// Every block goes through its stages by itself: a read block is verified and scattered as soon as
// it has arrived, whatever the others do, and a block that fails stops no other one. Copies and
// checksums run on the copy threads, I/O in the backend, deadlines on one reactor thread; another
// one asks the backend to give up what has ended early.
//
// Every job ends at its deadline at the latest (see job.h). The engine keeps the job and its
// arrays until it is quiesced, the caller the memory that its addresses name. Each job is announced
// in the completion queue: once with both flags, or as terminal first and quiesced later.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kvx/backend_factory.h"
#include "kvx/batch.h"
#include "kvx/completion_queue.h"
#include "kvx/device.h"
#include "kvx/engine_stats.h"
#include "kvx/failpoint.h"
#include "kvx/job.h"

namespace kvx {

class EngineCore;

struct EngineOptions {
  int copy_threads = 0;  // 0: one a CPU
  BackendKind backend = BackendKind::kAuto;
  BackendOptions backend_options;  // its failpoints spoil copies, too
};

struct CloseReport {
  int64_t cancelled_jobs = 0;   // had not ended by themselves
  int64_t abandoned_jobs = 0;   // still moving bytes: their memory must never be freed or reused
  int64_t abandoned_bytes = 0;  // of those jobs
};

// Thread-safe.
class Engine {
 public:
  static Status create(const EngineOptions& options, std::unique_ptr<Engine>* engine);
  ~Engine();  // close() with a bound of a second
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  std::string_view backend_name() const;
  // Why io_uring is not in use; empty when it is, or was not asked for.
  const std::string& backend_reason() const { return backend_reason_; }

  // Starts a batch. `deadline_s` counts from now; zero or less gives a job that times out at once.
  // Never blocks on the work. kUsage: see validate(); kCancelled: the engine is closed.
  Status submit(Batch batch, double deadline_s, std::shared_ptr<Job>* job);

  // Gives the engine the device that jobs with device memory run on; once, before the first of
  // them.
  Status attach_device(std::shared_ptr<Device> device, const CopyOptions& options);
  CopyStats copy_stats() const;  // zeros without a device

  // See backend.h. Blocks while pages are pinned.
  Status register_buffer(uint8_t* base, int64_t bytes);
  void unregister_buffer(uint8_t* base);

  // Takes up to `max` notifications, waiting for the first; none: time is up or engine closed.
  std::vector<Completion> next_completions(size_t max, double timeout_s);
  // Makes one next_completions() return, with a notification of job 0: there is none.
  void wake();
  // An eventfd that is readable while notifications wait. Belongs to the engine.
  int fileno();

  EngineStats stats() const;

  // Refuses new jobs, gives running ones half of `timeout_s` to end, cancels the others and spends
  // the other half on their memory coming free. Later calls return the first report.
  CloseReport close(double timeout_s);
  bool is_closed() const;

 private:
  Engine() = default;

  std::shared_ptr<EngineCore> core_;
  std::string backend_reason_;
};

}  // namespace kvx
