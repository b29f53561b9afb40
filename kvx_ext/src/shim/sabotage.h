// Mistakes to be made on purpose, so that the tests can see them found. They exist in the build of
// the native tests alone: anywhere else `makes()` is false at compile time and nothing is left.
#pragma once

#ifdef KVX_SABOTAGE
#include <atomic>
#include <functional>
#endif

namespace kvx {

enum class Mistake {
  kNone,
  kSkipsEventWait,     // copies do not wait for the mark they are to begin after
  kAnyOrderAfterWait,  // batches read their source in any order although they wait for something
  kCompletesEarly,     // a copy is reported before its event has passed
  kFreesInFlight,      // closed copies say that they left nothing behind in the driver
  kQuiescesEarly,      // an ended job lets go of its memory while copies still run
  kRestsEarly,         // an ended job lets go of its planes while copies still run
  kUsesNullStream,     // copies go to the legacy default stream; made with the copies
  kSkipsFence,         // a pulled block is taken without a second look at its lease
};

#ifdef KVX_SABOTAGE
inline constexpr bool kCanMakeMistakes = true;
// In whatever was built from this, so that a file of code can be asked.
[[gnu::used]] inline constexpr char kMistakesMark[] = "kvx makes mistakes on purpose";
inline std::atomic<Mistake>& mistake() {
  static std::atomic<Mistake> made{Mistake::kNone};
  return made;
}
inline bool makes(Mistake which) { return mistake().load(std::memory_order_relaxed) == which; }
// Called on this thread between the steps of a copy, so that a test can play what others do then.
inline std::function<void()>& interruption() {
  static thread_local std::function<void()> made;
  return made;
}
inline void interrupt() {
  if (interruption()) interruption()();
}
#else
inline constexpr bool kCanMakeMistakes = false;
constexpr bool makes(Mistake) { return false; }
constexpr void interrupt() {}
#endif

}  // namespace kvx
