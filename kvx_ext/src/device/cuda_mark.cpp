#include "device/cuda_mark.h"

namespace kvx {

Status check_stream(uint64_t stream) {
  // 1 is CU_STREAM_LEGACY, the null stream by its other name.
  if (stream > 1) return Status::Ok();
  return {Code::kUsage,
          "the null stream orders all other work on the device: use a stream of your own"};
}

Status CudaMark::is_reached(bool* is_reached) {
  return device_->context().call("cuEventQuery", [&] {
    const cuda::Result result = device_->api().event_query(event_.get());
    *is_reached = result == cuda::kSuccess;
    return result == cuda::kErrorNotReady ? cuda::kSuccess : result;
  });
}

Status CudaDevice::mark(uint64_t stream, std::shared_ptr<StreamMark>* mark) {
  if (Status status = check_stream(stream); !status.ok()) return status;
  PooledEvent event;
  Status status = context_->call("cuEventRecord", [&] {
    const cuda::Result result = events_.take(&event);
    if (result != cuda::kSuccess) return result;
    return api().event_record(event.get(), reinterpret_cast<cuda::Stream>(stream));
  });
  if (status.ok()) *mark = std::make_shared<CudaMark>(shared_from_this(), std::move(event));
  return status;
}

}  // namespace kvx
