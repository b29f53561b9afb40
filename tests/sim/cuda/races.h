// The happens-before race detector. Every operation of a stream and every access of the host has a
// vector clock: what it is known to come after. Two accesses of overlapping ranges, one of them a
// write, neither of which is known to come after the other, are a race, whichever ran first here.
//
// The host is one component, all its threads together. Its clock learns that an operation ended
// when a call observes it (synchronize, query). All guarded by Simulation::mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <unordered_set>
#include <vector>

#include "clock.h"
#include "faults.h"

namespace kvx::sim {

struct Access {
  uint64_t start = 0;
  uint64_t end = 0;
  bool is_write = false;
  size_t owner = kHostOwner;  // whose clock `epoch` counts
  uint64_t epoch = 0;
  Label label;
  // Copies of one batch have no order among themselves; what a kernel does to itself is its affair.
  bool is_kernel = false;
};

class RaceDetector {
 public:
  // A new component for a stream.
  size_t new_owner() { return next_owner_++; }
  void reset();

  // What the host knows; operations begin with a copy of it.
  VectorClock host;

  // Holds the access against those before it, convicts, and remembers it.
  void add(const Access& access, const VectorClock& known, Convictions& convictions);
  // An access of the host itself, after which its clock is one further.
  void add_host(uint64_t address, size_t bytes, bool is_write, const char* symbol,
                Convictions& convictions);
  // The range ceases to be: convicts ("free_in_flight") what may still touch it, and forgets it.
  void remove(uint64_t address, size_t bytes, const char* symbol, Convictions& convictions);

  // Whether it has grown enough for `forget` to be worth its while.
  [[nodiscard]] bool is_large() const { return count_ > limit_; }
  // Drops accesses that everything still to come knows: those that `host` and all `others` know.
  void forget(const std::vector<VectorClock>& others);
  [[nodiscard]] size_t size() const { return count_; }

  // Words that streams write and wait for: the clock of the last write. They order, so races on
  // them are none.
  std::map<uint64_t, VectorClock> words;

 private:
  // Accesses by start, those of at most 2^k bytes in class k: what overlaps a range starts at most
  // 2^k before it.
  using Class = std::multimap<uint64_t, Access>;

  template <typename Visit>
  void visit_overlapping(uint64_t start, uint64_t end, Visit visit);
  void convict(const Access& before, const Access& now, Convictions& convictions);

  std::map<unsigned, Class> classes_;
  size_t count_ = 0;
  size_t limit_ = 0;
  size_t next_owner_ = 1;
  // Pairs of operations already convicted, by number.
  std::unordered_set<uint64_t> convicted_;
};

}  // namespace kvx::sim
