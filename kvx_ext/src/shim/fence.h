// Memory fences, but for ThreadSanitizer: it knows none, and gcc refuses them in its builds. What
// they order is bytes that are read while others write them, which it could not bless anyway.
#pragma once

#include <atomic>

namespace kvx {

#ifdef __SANITIZE_THREAD__
inline constexpr bool kHasFences = false;
inline void fence_loads() { std::atomic_signal_fence(std::memory_order_acquire); }
inline void fence_all() { std::atomic_signal_fence(std::memory_order_seq_cst); }
#else
inline constexpr bool kHasFences = true;
// Every load above has its value before any below is done.
inline void fence_loads() { std::atomic_thread_fence(std::memory_order_acquire); }
// Every store above is seen by all before any below, streaming stores included.
inline void fence_all() { std::atomic_thread_fence(std::memory_order_seq_cst); }
#endif

}  // namespace kvx
