// Copy threads: one grain of a job, block by block.
#include "engine_core.h"
#include "stages.h"

namespace kvx {

void EngineCore::run_grain(JobRecord& job, const Grain& grain) {
  const bool is_on_planes = job.batch.has_planes_on_host();
  if (!begin_copies(job, is_on_planes)) return;
  const bool is_outbound = job.batch.is_outbound();
  std::vector<int32_t> verified;
  int64_t refused = 0;
  int64_t settled = 0;
  for (int64_t at = grain.first; at < grain.first + grain.count && !job.is_ending(); ++at) {
    const int64_t block = job.ready_block(at);
    const bool is_begun = job.batch.is_begun_elsewhere();
    if (is_begun ? !job.ledger.is_open(block) : !job.ledger.begin(block)) continue;
    const bool flips_bit = copy_faults_ != nullptr && copy_faults_->strike();
    const auto index = static_cast<int32_t>(block);
    if (device_ != nullptr) note_slots(job, {&index, 1}, writes_slot(job.batch));
    const BlockOutcome outcome = run_stage(job.batch, block, flips_bit);
    if (is_outbound && outcome.code == Code::kOk) {
      verified.push_back(index);
      continue;
    }
    ++refused;
    if (!job.ledger.settle(block, outcome.code, 0, outcome.checksum)) continue;
    ++settled;
    // Others learn of it through the ledger's release below.
    if (outcome.code != Code::kOk) job.has_failed.store(true, std::memory_order_relaxed);
  }
  end_copies(job, is_on_planes);
  CopyGroup* group = nullptr;
  if (job.batch.is_layered()) {
    collect_verified(job, verified, refused);
  } else if (!verified.empty()) {
    group = add_group(job, std::move(verified));
  }
  // Before the blocks are sent, so that mostly nobody but their completion holds the job then, and
  // it announces both its ends at once.
  settle_balance(job, job.ledger.release(1, settled));
  if (group != nullptr) send_group(job, *group, 0, planes_of(job.batch));
}

bool EngineCore::help(JobRecord& job) {
  // A failpoint may hang the copy, and a waiter's own timeout must hold all the same.
  if (copy_faults_ != nullptr || !job.has_ready() || job.is_ending()) return false;
  return pool_.help(job);
}

}  // namespace kvx
