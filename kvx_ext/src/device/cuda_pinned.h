// Host memory registered with the driver piece by piece, and the list of it that copies consult.
//
// A registration of hundreds of GiB fails, and takes a tenth of a second a GiB: so there are pieces
// and a thread, and a copy that comes early registers the pieces it meets itself. No copy may span
// two registrations; the planner cuts at the pieces' ends.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "device/cuda_context.h"
#include "kvx/device.h"

namespace kvx {

// Thread-safe. May outlive its memory once unregister_all() was called: a lane looks at old lists.
class PinnedPieces {
 public:
  PinnedPieces(CudaContext& context, uint64_t base, int64_t bytes, int64_t piece_bytes);
  PinnedPieces(const PinnedPieces&) = delete;
  PinnedPieces& operator=(const PinnedPieces&) = delete;

  uint64_t base() const { return base_; }
  uint64_t end() const { return base_ + bytes_; }
  uint64_t piece_bytes() const { return piece_bytes_; }
  int64_t pinned_bytes() const { return pinned_bytes_.load(std::memory_order_relaxed); }

  // Registers what [address, address + bytes) lies in. True: all of it is registered. A piece
  // that the driver refused once is not tried again.
  bool ensure(uint64_t address, uint64_t bytes);
  void register_all();  // returns early after stop()
  void stop() { is_stopped_.store(true); }
  // REQUIRES: nothing registers any more, and no copy is in flight.
  void unregister_all();
  Status wait(double timeout_s, bool* is_done);

 private:
  enum class State : uint8_t { kNone, kRegistering, kRegistered, kFailed };

  bool ensure_piece(size_t piece);
  Status call_driver(size_t piece);
  uint64_t start_of(size_t piece) const { return base_ + piece * piece_bytes_; }
  uint64_t size_of(size_t piece) const;

  CudaContext& context_;
  const uint64_t base_;
  const uint64_t bytes_;
  const uint64_t piece_bytes_;
  std::vector<std::atomic<State>> states_;  // changed under mutex_
  std::atomic<int64_t> pinned_bytes_{0};
  std::atomic<bool> is_stopped_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t untried_ = 0;  // mutex_
  Status refusal_;      // mutex_; the first
};

// What was pinned at one moment. Immutable, sorted by base.
struct PinnedView {
  std::vector<CopyLimits::PinnedSpan> spans;
  std::vector<std::shared_ptr<PinnedPieces>> ranges;

  // True when all of it lies in one range and is registered (now, if it was not before).
  bool ensure(uint64_t address, uint64_t bytes) const;
  // Where the piece that `address` lies in ends; 0 outside of all ranges.
  uint64_t piece_end(uint64_t address) const;

 private:
  size_t find(uint64_t address) const;  // spans.size(): none
};

// Thread-safe.
class PinnedRegistry {
 public:
  PinnedRegistry() : view_(std::make_shared<PinnedView>()) {}

  Status add(std::shared_ptr<PinnedPieces> pieces);  // kUsage: overlaps another range
  void remove(const PinnedPieces* pieces);
  std::shared_ptr<const PinnedView> view() const;

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const PinnedView> view_;  // mutex_
};

}  // namespace kvx
