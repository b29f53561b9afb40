// Whom to evict. Each owner has its own order, so that a quota evicts from the owner it binds;
// otherwise the owner whose coldest block is coldest of all (of the lowest level) gives one up.
//
//   kLru              least recently touched.
//   kFifo             oldest commit; touches change nothing.
//   kLfu              least often touched (counted to 255), least recently among equals.
//   kLfuWithRecency   a touch adds one to a frequency (to 255) and every frequency is halved once
//                     per 8 * slots accesses; the block of the least bit_width(frequency) goes,
//                     the least recently promoted one within a level. Halving moves every level
//                     down by one as a whole: the cost is the number of levels, not of blocks.
//   kS3Fifo           a small FIFO of 10% of the slots in front of a main one; a block touched more
//                     than once in the small one moves to main, others leave and are remembered as
//                     fingerprints (ghosts of 75% of the slots, 2 bytes each), and come back
//                     straight into main. Main gives touched blocks another round per touch (to 3).
//                     Source: Yang et al., "FIFO queues are all you need for cache eviction",
//                     SOSP 2023, algorithm 1; there the ghosts are as many as main has slots.
#pragma once

#include <cstdint>

namespace kvx {

enum class EvictionPolicy : uint8_t {
  kLru = 0,
  kFifo = 1,
  kLfu = 2,
  kLfuWithRecency = 3,
  kS3Fifo = 4,
};

}  // namespace kvx
