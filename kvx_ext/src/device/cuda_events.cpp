#include "device/cuda_events.h"

namespace kvx {

PooledEvent::~PooledEvent() {
  if (pool_ != nullptr) pool_->give_back(event_);
}

CudaEvents::~CudaEvents() {
  for (cuda::Event event : idle_) {
    context_.release("cuEventDestroy", [&] { return context_.api().event_destroy(event); });
  }
}

cuda::Result CudaEvents::take(PooledEvent* event) {
  {
    std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      *event = PooledEvent(this, idle_.back());
      idle_.pop_back();
      return cuda::kSuccess;
    }
    idle_.reserve(++made_);  // so that giving back never allocates
  }
  cuda::Event made = nullptr;
  const cuda::Result result = context_.note(
      context_.api().event_create(&made, cuda::kEventBlockingSync | cuda::kEventDisableTiming));
  if (result == cuda::kSuccess) *event = PooledEvent(this, made);
  return result;
}

void CudaEvents::give_back(cuda::Event event) noexcept {
  std::lock_guard lock(mutex_);
  idle_.push_back(event);
}

}  // namespace kvx
