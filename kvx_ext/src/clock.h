// Monotonic time, and timeouts that cannot overflow it.
#pragma once

#include <algorithm>
#include <chrono>

namespace kvx {

using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;

// A year stands for "for ever": larger values overflow the clock.
inline constexpr double kForeverS = 3.15e7;

inline TimePoint time_after(double seconds) {
  const double bounded_s = std::clamp(seconds, 0.0, kForeverS);
  return Clock::now() +
         std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(bounded_s));
}

inline int64_t ns_between(TimePoint begin, TimePoint end) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count();
}

inline double seconds_until(TimePoint end) {
  return std::max(0.0, std::chrono::duration<double>(end - Clock::now()).count());
}

}  // namespace kvx
