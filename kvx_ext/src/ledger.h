// Who still owes what to one job: the outcome of every block, and two counts in one word.
//
// A block goes pending -> begun -> its code, each step by compare-and-swap, so that a worker and
// the deadline can both try to decide it and exactly one does. *Open* counts what has no outcome
// yet; the job is finished at zero. *Holds* counts whoever may touch the job's memory, plus one for
// the running job itself; the job is quiesced at zero, and nobody can begin again after that. Both
// counts change in one operation, so the one who finishes the job knows whether it is alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "kvx/status.h"

namespace kvx {

struct Balance {
  int64_t holds = 0;
  int64_t open = 0;
};

class Ledger {
 public:
  // `extra` open units beside the blocks (syncs). Starts with the running job's own hold.
  Ledger(int64_t blocks, int64_t extra)
      : blocks_(blocks),
        entries_(std::make_unique<Entry[]>(static_cast<size_t>(blocks))),
        counts_(kOneHold + static_cast<uint64_t>(blocks + extra)) {}

  // False: already decided, or begun by someone else; leave the block alone.
  bool begin(int64_t block) {
    int32_t expected = kPending;
    return entry(block).code.compare_exchange_strong(expected, kBegun, std::memory_order_acq_rel);
  }

  // Decides a begun block. False: it was decided meanwhile.
  bool settle(int64_t block, Code code, int error_number, uint64_t checksum) {
    Entry& target = entry(block);
    if (target.code.load(std::memory_order_relaxed) != kBegun) return false;
    target.error_number.store(error_number, std::memory_order_relaxed);
    target.checksum.store(checksum, std::memory_order_relaxed);
    int32_t expected = kBegun;
    return target.code.compare_exchange_strong(expected, static_cast<int32_t>(code),
                                               std::memory_order_acq_rel);
  }

  // Decides every block that is still open: kSkipped if it was never begun, else `begun_code`.
  void settle_rest(Code begun_code) {
    for (int64_t i = 0; i < blocks_; ++i) {
      int32_t seen = entry(i).code.load(std::memory_order_relaxed);
      while (seen < 0) {
        const Code code = seen == kPending ? Code::kSkipped : begun_code;
        if (entry(i).code.compare_exchange_weak(seen, static_cast<int32_t>(code),
                                                std::memory_order_acq_rel)) {
          break;
        }
      }
    }
  }

  bool is_open(int64_t block) const {
    return entry(block).code.load(std::memory_order_relaxed) < 0;
  }

  // False once the job is quiesced.
  bool try_hold(int64_t count) {
    uint64_t seen = counts_.load(std::memory_order_relaxed);
    while (seen >= kOneHold) {
      const uint64_t more = seen + static_cast<uint64_t>(count) * kOneHold;
      if (counts_.compare_exchange_weak(seen, more, std::memory_order_acq_rel)) return true;
    }
    return false;
  }

  Balance release(int64_t holds, int64_t settled) {
    const uint64_t delta = static_cast<uint64_t>(holds) * kOneHold + static_cast<uint64_t>(settled);
    const uint64_t left = counts_.fetch_sub(delta, std::memory_order_acq_rel) - delta;
    return {static_cast<int64_t>(left / kOneHold), static_cast<int64_t>(left % kOneHold)};
  }

  int64_t blocks() const { return blocks_; }
  int32_t code(int64_t block) const { return entry(block).code.load(std::memory_order_acquire); }
  int32_t error_number(int64_t block) const {
    return entry(block).error_number.load(std::memory_order_relaxed);
  }
  uint64_t checksum(int64_t block) const {
    return entry(block).checksum.load(std::memory_order_relaxed);
  }

 private:
  static constexpr int32_t kPending = -1;
  static constexpr int32_t kBegun = -2;
  static constexpr uint64_t kOneHold = uint64_t{1} << 32;

  struct Entry {
    std::atomic<int32_t> code{kPending};
    std::atomic<int32_t> error_number{0};
    std::atomic<uint64_t> checksum{0};
  };

  Entry& entry(int64_t block) { return entries_[static_cast<size_t>(block)]; }
  const Entry& entry(int64_t block) const { return entries_[static_cast<size_t>(block)]; }

  const int64_t blocks_;
  const std::unique_ptr<Entry[]> entries_;
  std::atomic<uint64_t> counts_;
};

}  // namespace kvx
