// What an engine has done and is doing, in numbers.
#pragma once

#include <array>
#include <cstdint>

#include "kvx/batch.h"
#include "kvx/job.h"

namespace kvx {

struct KindStats {
  int64_t jobs = 0;    // submitted
  int64_t blocks = 0;  // kOk, of ended jobs
  int64_t bytes = 0;   // of those blocks
  int64_t failed_blocks = 0;
  int64_t latency_ns_total = 0;  // of ended jobs
  int64_t latency_ns_max = 0;
};

struct EngineStats {
  std::array<KindStats, kJobKinds> kinds;
  std::array<int64_t, kJobStates> jobs_by_state{};  // kRunning: now; others: since creation
  int64_t copy_threads = 0;
  int64_t copy_queue_jobs = 0;  // have copying to do that no thread has taken yet
  int64_t io_in_flight = 0;     // requests in the backend
  int64_t completions_waiting = 0;
  int64_t completions_dropped = 0;  // nobody took them, see kCompletionsMax
  int64_t late_completions = 0;     // I/O that ended after its job
  int64_t quarantined_jobs = 0;     // ended, memory still in use
  int64_t quarantined_bytes = 0;
};

}  // namespace kvx
