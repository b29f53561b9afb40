// Vector clocks: what is known to have happened, one component per stream plus one for the host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvx::sim {

// Component 0; all host threads are one.
inline constexpr size_t kHostOwner = 0;

class VectorClock {
 public:
  [[nodiscard]] uint64_t at(size_t owner) const {
    return owner < epochs_.size() ? epochs_[owner] : 0;
  }

  void set(size_t owner, uint64_t epoch) {
    if (owner >= epochs_.size()) epochs_.resize(owner + 1);
    epochs_[owner] = epoch;
  }

  void join(const VectorClock& other) {
    if (other.epochs_.size() > epochs_.size()) epochs_.resize(other.epochs_.size());
    for (size_t i = 0; i < other.epochs_.size(); ++i) {
      epochs_[i] = std::max(epochs_[i], other.epochs_[i]);
    }
  }

 private:
  std::vector<uint64_t> epochs_;
};

}  // namespace kvx::sim
