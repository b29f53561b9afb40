// First half of the copy planner: runs that touch become one, and none crosses a piece of pinned
// memory. See copy_plan.h.
#pragma once

#include <cstdint>
#include <span>

#include "kvx/copy_plan.h"

namespace kvx {

// The side of a run that is host memory, and so has pieces.
enum class HostSide : uint8_t { kNone, kTarget, kSource };

inline HostSide host_side(CopyDirection direction) {
  switch (direction) {
    case CopyDirection::kHostToDevice:
      return HostSide::kSource;
    case CopyDirection::kDeviceToHost:
      return HostSide::kTarget;
    case CopyDirection::kDeviceToDevice:
      break;
  }
  return HostSide::kNone;
}

// The host memory that no copy may leave: a piece of a registration, or what lies between two.
struct Piece {
  uint64_t begin = 0;
  uint64_t end = 0;

  bool holds(uint64_t address) const { return address - begin < end - begin; }
};

// Finds pieces; remembers the last one, since neighbours are asked for in turn.
class Pieces {
 public:
  explicit Pieces(std::span<const CopyLimits::PinnedSpan> spans) : spans_(spans) {
    if (spans.empty()) piece_.end = UINT64_MAX;
  }

  const Piece& of(uint64_t address) {
    if (!piece_.holds(address)) piece_ = find(address);
    return piece_;
  }

 private:
  Piece find(uint64_t address) const;

  std::span<const CopyLimits::PinnedSpan> spans_;
  Piece piece_;
};

// Replaces plan->runs by `runs`, merged and cut; in another order where that merges a lot.
void merge_runs(const CopyRuns& runs, HostSide side, std::span<const CopyLimits::PinnedSpan> pinned,
                CopyPlan* plan);

// Puts plan->runs into the order of their host side if most of them touch there then; true if so.
bool sort_by_host_if_contiguous(HostSide side, std::span<const CopyLimits::PinnedSpan> pinned,
                                CopyPlan* plan);

}  // namespace kvx
