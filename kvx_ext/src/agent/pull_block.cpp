// One block: a look at the lease, the copy with its checksum, and a second look.
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "agent/puller.h"
#include "kvx/checksum.h"
#include "shim/fence.h"
#include "shim/sabotage.h"

namespace kvx {

namespace {

// Between steps of a large block it is looked whether anybody still wants it.
constexpr int64_t kStepBytes = int64_t{1} << 20;
// From here on a row is written past the caches. On an EPYC core, cold memory, cached against
// streaming stores in GB/s: 4 KiB rows 6.6 and 13.9, or 5.8 and 4.0 if they are read right after;
// 16 KiB 7.9 and 13.7, or 6.4 and 5.9; 256 KiB 9.2 and 20.9, or 7.5 and 11.1.
constexpr int64_t kStreamingBytes = int64_t{16} << 10;
// Of one process_vm_readv: enough to make the call cheap, few enough bytes to be in the caches
// still when they are checksummed.
constexpr size_t kBatchRuns = 128;
constexpr int64_t kBatchBytes = int64_t{512} << 10;

// Rows without gaps are one row.
Descriptor joined(const Descriptor& block) {
  if (block.count > 1 && block.stride != block.bytes) return block;
  return {block.offset, 0, 1, block.total()};
}

struct Pair {
  int64_t target = 0;
  int64_t source = 0;
  int64_t bytes = 0;
};

// Walks both sides of a block in step, whatever their rows. REQUIRES: their totals agree.
class PairWalk {
 public:
  PairWalk(const Descriptor& local, const Descriptor& remote)
      : blocks_{joined(local), joined(remote)},
        local_({&blocks_[0], 1}),
        remote_({&blocks_[1], 1}) {}
  PairWalk(const PairWalk&) = delete;
  PairWalk& operator=(const PairWalk&) = delete;

  bool next(Pair* pair) {
    if (target_.bytes == 0) target_ = local_.next(kStepBytes);
    if (target_.bytes == 0) return false;
    const Run source = remote_.next(target_.bytes);
    *pair = {target_.offset, source.offset, source.bytes};
    target_.offset += source.bytes;
    target_.bytes -= source.bytes;
    return true;
  }

 private:
  std::array<Descriptor, 2> blocks_;
  RowCursor local_;
  RowCursor remote_;
  Run target_;  // what is left of it
};

struct Copied {
  Code code = Code::kOk;
  int error_number = 0;
  uint64_t checksum = 0;
  bool has_written = false;
};

Copied copy_mapped(const PullTask& task, PairWalk& walk, uint64_t seed) {
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  uint8_t* base = task.record->region->base();
  Copied copied{.checksum = seed};
  for (Pair pair; walk.next(&pair);) {
    interrupt();
    if (task.record->is_ending()) {
      copied.code = Code::kCancelled;
      return copied;
    }
    const Stores stores = pair.bytes >= kStreamingBytes ? Stores::kStreaming : Stores::kCached;
    copied.checksum =
        kernel.copy(copied.checksum, base + pair.target, task.source.mapped + pair.source,
                    static_cast<size_t>(pair.bytes), stores);
    copied.has_written = true;
  }
  return copied;
}

void skip(std::span<iovec>* runs, size_t bytes) {
  while (bytes > 0) {
    iovec& run = runs->front();
    const size_t part = std::min(bytes, run.iov_len);
    run.iov_base = static_cast<uint8_t*>(run.iov_base) + part;
    run.iov_len -= part;
    bytes -= part;
    if (run.iov_len == 0) *runs = runs->subspan(1);
  }
}

// Sets code, error_number and has_written.
void read_foreign(const PullTask& task, std::span<const Pair> batch, Copied* copied) {
  std::array<iovec, kBatchRuns> target_runs;
  std::array<iovec, kBatchRuns> source_runs;
  uint8_t* base = task.record->region->base();
  for (size_t i = 0; i < batch.size(); ++i) {
    const auto bytes = static_cast<size_t>(batch[i].bytes);
    const uint64_t there = task.source.foreign_base + static_cast<uint64_t>(batch[i].source);
    target_runs[i] = {base + batch[i].target, bytes};
    source_runs[i] = {reinterpret_cast<void*>(there), bytes};
  }
  std::span<iovec> targets(target_runs.data(), batch.size());
  std::span<iovec> sources(source_runs.data(), batch.size());
  while (!targets.empty()) {
    const ssize_t got = process_vm_readv(task.source.pid, targets.data(), targets.size(),
                                         sources.data(), sources.size(), 0);
    if (got <= 0) {
      copied->error_number = got < 0 ? errno : EFAULT;
      // A zombie has no memory left either.
      copied->code = copied->error_number == ESRCH ? Code::kPeerLost : Code::kUnavailable;
      return;
    }
    copied->has_written = true;
    skip(&targets, static_cast<size_t>(got));
    skip(&sources, static_cast<size_t>(got));
  }
}

Copied copy_foreign(const PullTask& task, PairWalk& walk, uint64_t seed) {
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  const uint8_t* base = task.record->region->base();
  Copied copied{.checksum = seed};
  std::array<Pair, kBatchRuns> batch;
  for (bool has_more = true; has_more;) {
    interrupt();
    if (task.record->is_ending()) {
      copied.code = Code::kCancelled;
      return copied;
    }
    size_t runs = 0;
    for (int64_t bytes = 0; runs < kBatchRuns && bytes < kBatchBytes; ++runs) {
      has_more = walk.next(&batch[runs]);
      if (!has_more) break;
      bytes += batch[runs].bytes;
    }
    read_foreign(task, {batch.data(), runs}, &copied);
    if (copied.code != Code::kOk) return copied;
    for (const Pair& pair : std::span(batch.data(), runs)) {
      copied.checksum =
          kernel.update(copied.checksum, base + pair.target, static_cast<size_t>(pair.bytes));
    }
  }
  return copied;
}

// Why the source may not be read, or what was read may not be taken; kOk if it may.
Code look(const PullTask& task) {
  const bool is_foreign = task.source.mapped == nullptr;
  if (is_foreign && task.is_peer_there && !task.is_peer_there()) return Code::kPeerLost;
  const bool is_live = task.leases->is_live(task.lease_slot, task.lease_generation);
  return is_live ? Code::kOk : Code::kStale;
}

bool may_write(const PullTask& task) { return !task.may_write || task.may_write(); }

// 0xFF is NaN in every KV dtype: who ignores the outcome cannot mistake it for KV.
void poison(const PullTask& task, const Descriptor& block) {
  if (!may_write(task)) return;
  uint8_t* row = task.record->region->base() + block.offset;
  for (int64_t i = 0; i < block.count; ++i, row += block.stride) {
    std::memset(row, 0xff, static_cast<size_t>(block.bytes));
  }
}

}  // namespace

PullOutcome pull_block(const PullTask& task, int64_t block) {
  if (!may_write(task)) return {.code = Code::kStale};
  interrupt();
  if (const Code refusal = look(task); refusal != Code::kOk) return {.code = refusal};
  const RemoteRecord& record = *task.record;
  const auto index = static_cast<size_t>(block);
  const Descriptor local = joined(record.plan->local[index]);
  PairWalk walk(local, record.plan->remote[index]);
  const uint64_t seed =
      block_seed(record.key_of(block), static_cast<uint64_t>(record.bytes_of(block)));
  Copied copied = task.source.mapped != nullptr ? copy_mapped(task, walk, seed)
                                                : copy_foreign(task, walk, seed);
  interrupt();
  // Not one byte of the copy may be loaded after the look.
  fence_loads();
  if (copied.code != Code::kPeerLost && copied.code != Code::kCancelled) {
    const Code ending = makes(Mistake::kSkipsFence) ? Code::kOk : look(task);
    if (ending != Code::kOk) copied.code = ending;
  }
  PullOutcome outcome{.code = copied.code, .error_number = copied.error_number};
  if (copied.code == Code::kOk) {
    outcome.checksum = copied.checksum;
    if (!record.plan->checksums.empty() && copied.checksum != record.plan->checksums[index]) {
      outcome.code = Code::kCorrupt;
    }
  }
  if (outcome.code != Code::kOk && copied.has_written) poison(task, local);
  return outcome;
}

}  // namespace kvx
