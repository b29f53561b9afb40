// Whether a job's planes, which are its caller's memory, are at rest: nothing copies from or to
// them any more, whatever the job's requests to a disk still do to slots.
//
// One word holds how many copies are running and whether the job has ended. Every change of it is
// one read-modify-write, and those of one word have one order that all threads agree on. So a copy
// either enters before the end, and whoever looks afterwards finds it counted, or it finds the end
// and is refused: no fence, and no order of anything else, is part of the argument. A copy that has
// left did all it does before (release), and the changes after it carry that on to the one who
// finds the planes at rest (acquire).
#pragma once

#include <atomic>
#include <cstdint>

#include "shim/sabotage.h"

namespace kvx {

class PlanesGate {
 public:
  // False once the job has ended: leave the planes alone.
  [[nodiscard]] bool enter() {
    uint64_t seen = word_.load(std::memory_order_relaxed);
    do {
      if ((seen & kEnded) != 0) return false;
    } while (!word_.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel));
    return true;
  }

  // True for the one by whose leaving the planes came to rest after the end: others may wait.
  [[nodiscard]] bool leave() { return word_.fetch_sub(1, std::memory_order_acq_rel) == kEnded + 1; }

  void end() { word_.fetch_or(kEnded, std::memory_order_acq_rel); }

  bool is_at_rest() const {
    const uint64_t seen = word_.load(std::memory_order_acquire);
    return makes(Mistake::kRestsEarly) ? (seen & kEnded) != 0 : seen == kEnded;
  }

 private:
  static constexpr uint64_t kEnded = uint64_t{1} << 63;

  std::atomic<uint64_t> word_{0};
};

}  // namespace kvx
