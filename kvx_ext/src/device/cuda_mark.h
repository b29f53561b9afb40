// A point in a stream, as an event that was recorded there.
#pragma once

#include <memory>
#include <utility>

#include "device/cuda_device.h"

namespace kvx {

class CudaMark final : public StreamMark {
 public:
  CudaMark(std::shared_ptr<CudaDevice> device, PooledEvent event)
      : device_(std::move(device)), event_(std::move(event)) {}

  Status is_reached(bool* is_reached) override;
  cuda::Event event() const { return event_.get(); }

 private:
  const std::shared_ptr<CudaDevice> device_;
  const PooledEvent event_;
};

}  // namespace kvx
