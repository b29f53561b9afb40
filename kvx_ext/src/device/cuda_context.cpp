#include "device/cuda_context.h"

#include <new>
#include <utility>

namespace kvx {

bool is_fatal(cuda::Result result) {
  switch (result) {
    case cuda::kErrorDeinitialized:
    case cuda::kErrorEccUncorrectable:
    case cuda::kErrorNvlinkUncorrectable:
    case cuda::kErrorIllegalAddress:
    case cuda::kErrorLaunchTimeout:
    case cuda::kErrorContextIsDestroyed:
    case cuda::kErrorAssert:
    case cuda::kErrorHardwareStack:
    case cuda::kErrorIllegalInstruction:
    case cuda::kErrorMisalignedAddress:
    case cuda::kErrorInvalidAddressSpace:
    case cuda::kErrorInvalidPc:
    case cuda::kErrorLaunchFailed:
      return true;
    default:
      return false;
  }
}

Status CudaContext::retain(std::shared_ptr<const cuda::Driver> driver, int ordinal,
                           std::unique_ptr<CudaContext>* context) {
  const cuda::Api& api = driver->api;
  if (ordinal < 0 || ordinal >= driver->device_count) {
    return {Code::kUnavailable, "there is no CUDA device " + std::to_string(ordinal) +
                                    ": the driver finds " + std::to_string(driver->device_count) +
                                    ", counted from 0"};
  }
  cuda::DeviceOrdinal device = 0;
  if (const cuda::Result result = api.device_get(&device, ordinal); result != cuda::kSuccess) {
    return cuda::failure(api, "cuDeviceGet", result);
  }
  cuda::Context handle = nullptr;
  if (const cuda::Result result = api.primary_context_retain(&handle, device);
      result != cuda::kSuccess) {
    return cuda::failure(api, "cuDevicePrimaryCtxRetain", result);
  }
  context->reset(new CudaContext(std::move(driver), device, handle));
  return Status::Ok();
}

CudaContext::~CudaContext() {
  // Nobody is left who could ask for health: at exit the driver may be gone already.
  (void)api().primary_context_release(device_);
}

cuda::Result CudaContext::note(cuda::Result result) {
  if (is_fatal(result)) {
    cuda::Result none = cuda::kSuccess;
    fatal_.compare_exchange_strong(none, result);
  }
  return result;
}

Status CudaContext::check(std::string_view what, cuda::Result result) {
  if (result == cuda::kSuccess) return Status::Ok();
  note(result);
  return cuda::failure(api(), what, result);
}

void CudaContext::note_lost(const char* what, cuda::Result result) noexcept {
  // With the context dead everything is lost, and health() says so.
  if (is_fatal(note(result)) || is_dead()) return;
  try {
    const Status failed = cuda::failure(api(), what, result);
    std::lock_guard lock(mutex_);
    if (lost_.ok()) lost_ = {Code::kCapacity, "lost to the driver: " + failed.message(), result};
  } catch (const std::bad_alloc&) {
    // No memory for the sentence; what it would have said is lost as well.
  }
}

Status CudaContext::health() const {
  if (is_dead()) {
    return {Code::kDevice,
            cuda::failure(api(), "the device ended for this process", fatal()).message(), fatal()};
  }
  std::lock_guard lock(mutex_);
  return lost_;
}

}  // namespace kvx
