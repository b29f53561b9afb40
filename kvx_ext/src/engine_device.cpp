// Device stages: copies out to the backend, completions in.
//
// Blocks from the device arrive in their slots a group at a time, and the copy threads checksum one
// group while the next is on its way. Blocks to the device are verified by the copy threads first;
// what they let pass goes out a grain at a time, or layer by layer once all of a job is verified.
#include <algorithm>

#include "engine_core.h"
#include "stages.h"

namespace kvx {

namespace {

// Small enough that checksums start soon, large enough that a group costs nothing (a driver call
// and an event are some microseconds, 2 MiB take 40 at 54 GB/s).
constexpr int64_t kGroupBytes = int64_t{2} << 20;

CopyDirection direction_of(const Batch& batch) {
  if (batch.is_inside_device()) return CopyDirection::kDeviceToDevice;
  return batch.is_inbound() ? CopyDirection::kDeviceToHost : CopyDirection::kHostToDevice;
}

// Between block `block` of planes [first, first + count) and its canonical bytes at `slot`.
void add_planes(const Batch& batch, int64_t block, uint64_t slot, int first, int count,
                bool is_to_planes, CopyRuns* runs) {
  const std::vector<Plane>& planes = batch.planes.planes();
  for (int i = 0; i < first + count; ++i) {
    const Plane& plane = planes[static_cast<size_t>(i)];
    const auto bytes = static_cast<size_t>(plane.bytes);
    if (i >= first) {
      const auto place = reinterpret_cast<uint64_t>(plane.base + block * plane.stride);
      is_to_planes ? runs->add(place, slot, bytes) : runs->add(slot, place, bytes);
    }
    slot += bytes;
  }
}

CopyRuns runs_of(const Batch& batch, const std::vector<int32_t>& blocks, int first, int count) {
  CopyRuns runs;
  for (const int32_t block : blocks) {
    const auto i = static_cast<size_t>(block);
    if (batch.kind == JobKind::kFetch) {
      runs.add(static_cast<uint64_t>(batch.addresses[i]),
               static_cast<uint64_t>(batch.device_addresses[i]),
               static_cast<size_t>(batch.block_bytes));
      continue;
    }
    const auto& slots = batch.is_inside_device() ? batch.device_addresses : batch.addresses;
    const bool is_to_planes = batch.is_outbound() || batch.kind == JobKind::kDeviceOut;
    add_planes(batch, batch.ids[i], static_cast<uint64_t>(slots[i]), first, count, is_to_planes,
               &runs);
  }
  return runs;
}

}  // namespace

void EngineCore::submit_copies(JobRecord& job) {
  const int64_t group_blocks = std::max<int64_t>(1, kGroupBytes / job.batch.block_bytes);
  const int64_t blocks = job.batch.blocks();
  for (int64_t first = 0; first < blocks && !job.is_ending(); first += group_blocks) {
    std::vector<int32_t> begun;
    for (int64_t i = first; i < std::min(blocks, first + group_blocks); ++i) {
      if (job.ledger.begin(i)) begun.push_back(static_cast<int32_t>(i));
    }
    CopyGroup* group = begun.empty() ? nullptr : add_group(job, std::move(begun));
    if (group != nullptr) send_group(job, *group, 0, planes_of(job.batch));
  }
}

// Null when the job has ended; else the group holds it.
CopyGroup* EngineCore::add_group(JobRecord& job, std::vector<int32_t> blocks) {
  if (!begin_copies(job, job.batch.has_planes_on_device())) return nullptr;
  std::lock_guard lock(job.groups_mutex);
  CopyGroup& group = job.groups.emplace_back();
  group.job = &job;
  group.blocks = std::move(blocks);
  return &group;
}

void EngineCore::collect_verified(JobRecord& job, const std::vector<int32_t>& blocks,
                                  int64_t refused) {
  {
    std::lock_guard lock(job.groups_mutex);
    job.verified.insert(job.verified.end(), blocks.begin(), blocks.end());
    job.unverified -= static_cast<int64_t>(blocks.size()) + refused;
    if (job.unverified > 0) return;
  }
  send_layers(job);
}

// Everything is verified, so nothing is ready that could still prove wrong.
void EngineCore::send_layers(JobRecord& job) {
  if (job.verified.empty() || job.is_ending()) return;
  // As the caller listed them, whichever thread was done first: neighbours merge.
  std::sort(job.verified.begin(), job.verified.end());
  const int layers = planes_of(job.batch) / job.batch.layer_planes;
  for (int layer = 0; layer < layers; ++layer) {
    CopyGroup* group = add_group(job, job.verified);
    if (group == nullptr) return;
    group->layers_done = layer + 1;
    group->settles = layer + 1 == layers;
    send_group(job, *group, layer * job.batch.layer_planes, job.batch.layer_planes);
  }
}

// REQUIRES: the caller keeps the job alive.
void EngineCore::send_group(JobRecord& job, CopyGroup& group, int first_plane, int planes) {
  group.is_in_flight.store(true, std::memory_order_release);
  copies_->submit({.direction = direction_of(job.batch),
                   .runs = runs_of(job.batch, group.blocks, first_plane, planes),
                   .token = reinterpret_cast<uint64_t>(&group),
                   .after = job.batch.after});
  // Who ended the job meanwhile may have cancelled what the backend had not seen yet.
  if (job.is_ending()) canceller_.cancel_requests(job.shared_from_this());
}

void EngineCore::on_copies(std::span<const CopyCompletion> completions) {
  for (const CopyCompletion& completion : completions) {
    auto& group = *reinterpret_cast<CopyGroup*>(completion.token);
    // The hold may go below, and with it the table's reference.
    const std::shared_ptr<JobRecord> job = group.job->shared_from_this();
    group.is_in_flight.store(false, std::memory_order_release);
    if (job->is_ending()) counters_.on_late();
    end_copies(*job, job->batch.has_planes_on_device());
    const bool has_arrived = completion.code == Code::kOk;
    const bool is_for_copying = has_arrived && job->batch.is_inbound();
    int64_t settled = 0;
    if (!is_for_copying && (group.settles || !has_arrived)) {
      settled = settle_group(*job, group, completion);
    }
    if (has_arrived && group.layers_done > 0 && !group.settles && job->batch.progress != nullptr) {
      job->batch.progress->advance(job->id, group.layers_done);
    }
    settle_balance(*job, job->ledger.release(1, settled));
    if (!is_for_copying || job->is_ending()) continue;
    job->publish_ready(group.blocks);
    pool_.offer(job);
  }
}

int64_t EngineCore::settle_group(JobRecord& job, const CopyGroup& group,
                                 const CopyCompletion& completion) {
  int64_t settled = 0;
  for (const int32_t block : group.blocks) {
    const auto i = static_cast<size_t>(block);
    const uint64_t checksum = job.batch.checksums.empty() ? 0 : job.batch.checksums[i];
    if (!job.ledger.settle(block, completion.code, completion.driver_error, checksum)) continue;
    ++settled;
    if (completion.code != Code::kOk) job.has_failed.store(true, std::memory_order_relaxed);
  }
  return settled;
}

void EngineCore::note_slots(const JobRecord& job, std::span<const int32_t> blocks,
                            bool is_write) const {
  for (const int32_t block : blocks) {
    device_->note_host_access(
        reinterpret_cast<const void*>(job.batch.addresses[static_cast<size_t>(block)]),
        job.batch.block_bytes, is_write);
  }
}

}  // namespace kvx
