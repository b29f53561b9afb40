// Mistakes to be made on purpose, so that the tests can see them found. They exist in the build of
// the native tests alone: anywhere else `makes()` is false at compile time and nothing is left.
#pragma once

#ifdef KVX_SABOTAGE
#include <atomic>
#endif

namespace kvx {

enum class Mistake {
  kNone,
  kSkipsEventWait,     // copies do not wait for the mark they are to begin after
  kAnyOrderAfterWait,  // batches read their source in any order although they wait for something
  kCompletesEarly,     // a copy is reported before its event has passed
  kQuiescesEarly,      // a job's memory is let go of at its deadline while copies still run
  kUsesNullStream,     // copies go to the legacy default stream
};

#ifdef KVX_SABOTAGE
inline std::atomic<Mistake>& mistake() {
  static std::atomic<Mistake> made{Mistake::kNone};
  return made;
}
inline bool makes(Mistake which) { return mistake().load(std::memory_order_relaxed) == which; }
#else
constexpr bool makes(Mistake) { return false; }
#endif

}  // namespace kvx
