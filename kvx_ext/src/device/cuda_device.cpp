#include "device/cuda_device.h"

#include <utility>

#include "device/cuda_copies.h"
#include "device/cuda_info.h"
#include "device/cuda_memory.h"
#include "kernels/kernel_set.h"

namespace kvx {

CudaDevice::CudaDevice(std::unique_ptr<CudaContext> context, DeviceInfo info)
    : context_(std::move(context)),
      events_(*context_),
      gate_words_(*context_),
      info_(std::move(info)) {}

CudaDevice::~CudaDevice() {
  // Unloading a module needs the context; without it the kernels go with the context.
  const ContextScope scope(*context_);
  kernels_.reset();
}

DeviceInfo CudaDevice::info() const {
  std::lock_guard lock(mutex_);
  return info_;
}

Status CudaDevice::open(const CudaDeviceOptions& options, std::shared_ptr<Device>* device) {
  std::shared_ptr<const cuda::Driver> driver;
  if (Status status = cuda::load_driver(options.library, &driver); !status.ok()) return status;
  std::unique_ptr<CudaContext> context;
  if (Status status = CudaContext::retain(driver, options.ordinal, &context); !status.ok()) {
    return status;
  }
  DeviceInfo info;
  if (Status status = describe_device(*driver, options.ordinal, &info); !status.ok()) {
    return status;
  }
  *device = std::make_shared<CudaDevice>(std::move(context), std::move(info));
  return Status::Ok();
}

Status CudaDevice::memory_bytes(int64_t* free_bytes, int64_t* total_bytes) {
  size_t free_now = 0;
  size_t total = 0;
  Status status = context_->call("cuMemGetInfo", [&] { return api().mem_info(&free_now, &total); });
  if (!status.ok()) return status;
  *free_bytes = static_cast<int64_t>(free_now);
  *total_bytes = static_cast<int64_t>(total);
  return Status::Ok();
}

Status CudaDevice::allocate(int64_t bytes, bool is_exportable,
                            std::unique_ptr<DeviceMemory>* memory) {
  if (bytes <= 0) return {Code::kUsage, "device memory needs bytes > 0"};
  return is_exportable ? MappedMemory::create(shared_from_this(), bytes, memory)
                       : PlainMemory::create(shared_from_this(), bytes, memory);
}

Status CudaDevice::make_copies(const CopyOptions& options, CopySink sink,
                               std::unique_ptr<CopyBackend>* copies) {
  return make_cuda_copies(shared_from_this(), options, std::move(sink), copies);
}

Status CudaDevice::check_address(uint64_t address, int64_t* bytes) {
  const auto ask = [&](int attribute, void* value) {
    return api().pointer_attribute(value, attribute, address);
  };
  int kind = 0;
  int ordinal = -1;
  cuda::DevicePointer start = 0;
  size_t size = 0;
  Status status = context_->call("cuPointerGetAttribute", [&] {
    cuda::Result result = ask(cuda::kPointerMemoryType, &kind);
    // What the driver has never heard of is host memory, not an error of the device.
    if (result == cuda::kErrorInvalidValue) return cuda::kSuccess;
    if (result == cuda::kSuccess) result = ask(cuda::kPointerDeviceOrdinal, &ordinal);
    if (result == cuda::kSuccess) result = ask(cuda::kPointerRangeStart, &start);
    if (result == cuda::kSuccess) result = ask(cuda::kPointerRangeSize, &size);
    return result;
  });
  if (!status.ok()) return status;
  if (kind != cuda::kMemoryTypeDevice) {
    return {Code::kUsage, "address " + std::to_string(address) + " is not device memory"};
  }
  if (ordinal != context_->device()) {
    return {Code::kUsage, "address " + std::to_string(address) + " is memory of device " +
                              std::to_string(ordinal) + ", not of device " +
                              std::to_string(context_->device())};
  }
  *bytes = static_cast<int64_t>(start + size - address);
  return Status::Ok();
}

Status CudaDevice::create_stream(uint64_t* stream) {
  cuda::Stream made = nullptr;
  Status status = context_->call("cuStreamCreateWithPriority", [&] {
    return api().stream_create(&made, cuda::kStreamNonBlocking, 0);
  });
  if (status.ok()) *stream = reinterpret_cast<uint64_t>(made);
  return status;
}

Status CudaDevice::destroy_stream(uint64_t stream) {
  if (Status status = check_stream(stream); !status.ok()) return status;
  return context_->call("cuStreamDestroy", [&] {
    return api().stream_destroy(reinterpret_cast<cuda::Stream>(stream));
  });
}

Status CudaDevice::synchronize_stream(uint64_t stream) {
  if (Status status = check_stream(stream); !status.ok()) return status;
  return context_->call("cuStreamSynchronize", [&] {
    return api().stream_synchronize(reinterpret_cast<cuda::Stream>(stream));
  });
}

Status CudaDevice::fill(uint64_t address, uint8_t value, int64_t bytes, uint64_t stream) {
  if (Status status = check_stream(stream); !status.ok()) return status;
  if (bytes < 0) return {Code::kUsage, "bytes must be at least 0"};
  return context_->call("cuMemsetD8Async", [&] {
    return api().memset_async(address, value, static_cast<size_t>(bytes),
                              reinterpret_cast<cuda::Stream>(stream));
  });
}

void CudaDevice::note_host_access(const void* address, int64_t bytes, bool is_write) {
  const cuda::HostAccess access = context_->driver().host_access;
  if (access != nullptr) access(address, static_cast<size_t>(bytes), is_write ? 1 : 0);
}

Status CudaDevice::kernels(std::shared_ptr<KernelSet>* kernels) {
  std::lock_guard loading(kernels_mutex_);
  if (kernels_ == nullptr && kernels_status_.ok()) {
    const ContextScope scope(*context_);
    if (scope.result() != cuda::kSuccess) {
      return context_->check("cuCtxPushCurrent", scope.result());
    }
    const DeviceInfo known = info();
    std::unique_ptr<KernelSet> loaded;
    kernels_status_ = KernelSet::load(api(), known.compute_major, known.compute_minor, &loaded);
    kernels_ = std::move(loaded);
    std::lock_guard lock(mutex_);
    info_.kernels = kernels_ == nullptr ? kernels_status_.message() : kernels_->origin();
  }
  *kernels = kernels_;
  return kernels_status_;
}

Status open_cuda_device(const CudaDeviceOptions& options, std::shared_ptr<Device>* device) {
  return CudaDevice::open(options, device);
}

Status list_cuda_devices(const std::string& library, std::vector<DeviceInfo>* devices) {
  std::shared_ptr<const cuda::Driver> driver;
  if (Status status = cuda::load_driver(library, &driver); !status.ok()) return status;
  devices->clear();
  for (int ordinal = 0; ordinal < driver->device_count; ++ordinal) {
    DeviceInfo info;
    if (Status status = describe_device(*driver, ordinal, &info); !status.ok()) return status;
    devices->push_back(std::move(info));
  }
  return Status::Ok();
}

}  // namespace kvx
