// The ghost queue of S3-FIFO: 16-bit fingerprints of blocks that left the small queue untouched.
//
// Sets of eight, one FIFO each: a wrong match happens with probability 8 / 65536 and only sends a
// new block to the main queue.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kvx/huge_array.h"
#include "kvx/status.h"

namespace kvx {

class GhostQueue {
 public:
  // Forgets everything and makes room for about `capacity` ghosts.
  Status reset(size_t capacity) { return sets_.resize(std::max<size_t>(capacity / kWays, 1)); }

  void add(uint64_t hash) {
    uint16_t* marks = set_of(hash).marks;
    std::copy_backward(marks, marks + kWays - 1, marks + kWays);
    marks[0] = fingerprint(hash);
  }

  // Whether it is there; if so it is no longer.
  bool take(uint64_t hash) {
    uint16_t* marks = set_of(hash).marks;
    uint16_t* at = std::find(marks, marks + kWays, fingerprint(hash));
    if (at == marks + kWays) return false;
    std::copy(at + 1, marks + kWays, at);
    marks[kWays - 1] = 0;
    return true;
  }

  [[nodiscard]] int64_t memory_bytes() const { return sets_.memory_bytes(); }

 private:
  static constexpr size_t kWays = 8;
  struct Set {
    uint16_t marks[kWays];  // newest first, 0 = none
  };

  static uint16_t fingerprint(uint64_t hash) {
    const auto mark = static_cast<uint16_t>(hash);
    return mark == 0 ? uint16_t{1} : mark;
  }
  Set& set_of(uint64_t hash) const { return sets_[((hash >> 32) * sets_.size()) >> 32]; }

  HugeArray<Set> sets_;
};

}  // namespace kvx
