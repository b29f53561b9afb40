// The engine's counters: relaxed atomics, so that a sum may be a job behind but never a lock ahead.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>

#include "job_record.h"
#include "kvx/engine_stats.h"

namespace kvx {

class Counters {
 public:
  void on_begin(const JobRecord& job) {
    add(kind(job).jobs, 1);
    add(states_[0], 1);
  }

  void on_end(const JobRecord& job, JobState state, const Totals& done) {
    Kind& counts = kind(job);
    const int64_t latency = job.latency_ns.load(std::memory_order_relaxed);
    add(counts.blocks, done.blocks);
    add(counts.bytes, done.bytes);
    add(counts.failed_blocks, job.batch.blocks() - done.blocks);
    add(counts.latency_total, latency);
    int64_t longest = counts.latency_max.load(std::memory_order_relaxed);
    while (latency > longest && !counts.latency_max.compare_exchange_weak(longest, latency)) {
    }
    add(states_[0], -1);
    add(states_[static_cast<size_t>(state)], 1);
  }

  void on_quarantine(const JobRecord& job, int64_t sign) {
    add(quarantined_jobs_, sign);
    add(quarantined_bytes_, sign * job.total_bytes);
  }
  void on_io(int64_t requests) { add(io_in_flight_, requests); }
  void on_late() { add(late_completions_, 1); }

  void fill(EngineStats* stats) const {
    for (size_t i = 0; i < kinds_.size(); ++i) {
      const Kind& from = kinds_[i];
      stats->kinds[i] = {from.jobs,          from.blocks,        from.bytes,
                         from.failed_blocks, from.latency_total, from.latency_max};
    }
    for (size_t i = 0; i < states_.size(); ++i) stats->jobs_by_state[i] = states_[i];
    stats->io_in_flight = io_in_flight_;
    stats->late_completions = late_completions_;
    stats->quarantined_jobs = quarantined_jobs_;
    stats->quarantined_bytes = quarantined_bytes_;
  }

 private:
  using Count = std::atomic<int64_t>;

  struct Kind {
    Count jobs{0};
    Count blocks{0};
    Count bytes{0};
    Count failed_blocks{0};
    Count latency_total{0};
    Count latency_max{0};
  };

  static void add(Count& count, int64_t value) {
    count.fetch_add(value, std::memory_order_relaxed);
  }
  Kind& kind(const JobRecord& job) { return kinds_[static_cast<size_t>(job.batch.kind)]; }

  std::array<Kind, kJobKinds> kinds_;
  std::array<Count, kJobStates> states_{};
  Count io_in_flight_{0};
  Count late_completions_{0};
  Count quarantined_jobs_{0};
  Count quarantined_bytes_{0};
};

}  // namespace kvx
