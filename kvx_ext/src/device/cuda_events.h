// Events for marks, gates and lanes, used again: making one takes the driver tens of microseconds.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

#include "device/cuda_context.h"

namespace kvx {

class CudaEvents;

// An event of the pool. May go back while it is pending: a wait that was enqueued on it refers to
// the record before it, not to the next one.
class PooledEvent {
 public:
  PooledEvent() = default;
  PooledEvent(CudaEvents* pool, cuda::Event event) : pool_(pool), event_(event) {}
  PooledEvent(PooledEvent&& other) noexcept { swap(other); }
  PooledEvent& operator=(PooledEvent&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PooledEvent();

  cuda::Event get() const { return event_; }
  explicit operator bool() const { return event_ != nullptr; }

 private:
  void swap(PooledEvent& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(event_, other.event_);
  }

  CudaEvents* pool_ = nullptr;
  cuda::Event event_ = nullptr;
};

// Thread-safe. Outlives its events.
class CudaEvents {
 public:
  explicit CudaEvents(CudaContext& context) : context_(context) {}
  ~CudaEvents();
  CudaEvents(const CudaEvents&) = delete;
  CudaEvents& operator=(const CudaEvents&) = delete;

  // REQUIRES: the context is current.
  cuda::Result take(PooledEvent* event);

 private:
  friend class PooledEvent;
  void give_back(cuda::Event event) noexcept;

  CudaContext& context_;
  std::mutex mutex_;
  std::vector<cuda::Event> idle_;  // mutex_; capacity for every event there is
  size_t made_ = 0;                // mutex_
};

}  // namespace kvx
