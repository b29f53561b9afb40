// The primary context of one CUDA device, and what was learned from the errors of its calls.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "kvx/status.h"
#include "shim/cuda/loader.h"

namespace kvx {

// Does this error end the context? Every later call returns it too, and nothing moves any more.
[[nodiscard]] bool is_fatal(cuda::Result result);

// Thread-safe.
class CudaContext {
 public:
  static Status retain(std::shared_ptr<const cuda::Driver> driver, int ordinal,
                       std::unique_ptr<CudaContext>* context);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  const cuda::Driver& driver() const { return *driver_; }
  const cuda::Api& api() const { return driver_->api; }
  cuda::DeviceOrdinal device() const { return device_; }
  cuda::Context handle() const { return handle_; }

  // `result` of the call `what`, as a Status; remembers it when it ends the context.
  Status check(std::string_view what, cuda::Result result);
  // The same without a sentence, for the data path.
  cuda::Result note(cuda::Result result);

  // Runs `call` (cuda::Result()) with this context current.
  template <typename Call>
  Status call(std::string_view what, Call call);
  // For destructors: gives something back to the driver. A refusal is kept for health().
  template <typename Call>
  void release(const char* what, Call call) noexcept;

  cuda::Result fatal() const { return fatal_.load(std::memory_order_acquire); }
  bool is_dead() const { return fatal() != cuda::kSuccess; }
  Status health() const;

 private:
  CudaContext(std::shared_ptr<const cuda::Driver> driver, cuda::DeviceOrdinal device,
              cuda::Context handle)
      : driver_(std::move(driver)), device_(device), handle_(handle) {}
  void note_lost(const char* what, cuda::Result result) noexcept;

  const std::shared_ptr<const cuda::Driver> driver_;
  const cuda::DeviceOrdinal device_;
  const cuda::Context handle_;
  std::atomic<cuda::Result> fatal_{cuda::kSuccess};
  mutable std::mutex mutex_;
  Status lost_;  // mutex_; the first refusal to take something back
};

// Makes the context current on this thread, and what was current before current again.
class ContextScope {
 public:
  explicit ContextScope(const CudaContext& context)
      : api_(context.api()), result_(api_.context_push(context.handle())) {}
  ~ContextScope() {
    if (result_ != cuda::kSuccess) return;
    // Where the pop fails the context stays current, which the next scope corrects by pushing.
    cuda::Context popped = nullptr;
    (void)api_.context_pop(&popped);
  }
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

  cuda::Result result() const { return result_; }

 private:
  const cuda::Api& api_;
  const cuda::Result result_;
};

template <typename Call>
Status CudaContext::call(std::string_view what, Call call) {
  const ContextScope scope(*this);
  if (scope.result() != cuda::kSuccess) return check("cuCtxPushCurrent", scope.result());
  return check(what, call());
}

template <typename Call>
void CudaContext::release(const char* what, Call call) noexcept {
  // Once more, because a thread without the context is no reason to lose memory.
  for (const bool is_last : {false, true}) {
    const ContextScope scope(*this);
    if (scope.result() != cuda::kSuccess && !is_last) continue;
    const cuda::Result result = scope.result() == cuda::kSuccess ? call() : scope.result();
    if (result != cuda::kSuccess) note_lost(what, result);
    return;
  }
}

}  // namespace kvx
