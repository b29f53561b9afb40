// Which memory is registered with a ring, in pieces of at most 1 GiB (the kernel's limit per slot).
// Owned by the ring's thread.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "backends/uring_ring.h"
#include "kvx/status.h"

namespace kvx {

class UringBuffers {
 public:
  explicit UringBuffers(UringRing& ring) : ring_(ring) {}

  Status add(uint8_t* base, int64_t bytes);
  void remove(uint8_t* base);

  struct Place {
    int slot = -1;      // -1: not registered, take the ordinary path
    int64_t bytes = 0;  // how many of the asked bytes share that answer
  };
  Place find(const uint8_t* start, int64_t bytes) const;

 private:
  struct Piece {
    int64_t bytes;
    uint32_t slot;
    uint8_t* owner;  // the base that add() was given
  };

  Status open_table();

  UringRing& ring_;
  std::map<const uint8_t*, Piece> pieces_;  // by address
  std::vector<uint32_t> free_slots_;
  bool has_table_ = false;
};

}  // namespace kvx
