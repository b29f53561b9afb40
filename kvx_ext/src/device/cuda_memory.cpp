#include "device/cuda_memory.h"

#include <utility>

namespace kvx {

namespace {

cuda::AllocationProperties exportable_on(cuda::DeviceOrdinal device) {
  cuda::AllocationProperties properties;
  properties.type = cuda::kAllocationPinned;
  properties.handle_types = cuda::kHandlePosixFileDescriptor;
  properties.location = {cuda::kLocationDevice, device};
  return properties;
}

std::string of_bytes(const char* call, int64_t bytes) {
  return std::string(call) + " of " + std::to_string(bytes) + " bytes";
}

}  // namespace

Status PlainMemory::create(std::shared_ptr<CudaDevice> device, int64_t bytes,
                           std::unique_ptr<DeviceMemory>* memory) {
  cuda::DevicePointer address = 0;
  Status status = device->context().call(of_bytes("cuMemAlloc", bytes), [&] {
    return device->api().mem_alloc(&address, static_cast<size_t>(bytes));
  });
  if (!status.ok()) return status;
  memory->reset(new PlainMemory(std::move(device), address, bytes));
  return Status::Ok();
}

PlainMemory::~PlainMemory() {
  device_->context().release("cuMemFree", [this] { return device_->api().mem_free(address_); });
}

Status MappedMemory::create(std::shared_ptr<CudaDevice> device, int64_t bytes,
                            std::unique_ptr<DeviceMemory>* memory) {
  if (!device->info().has_exportable_memory) {
    return {Code::kUnavailable,
            "this device has no memory that can be shared by file descriptor; plain memory can be "
            "shared by IPC handle"};
  }
  std::unique_ptr<MappedMemory> made(new MappedMemory(device));
  const cuda::AllocationProperties properties = exportable_on(device->context().device());
  const cuda::Api& api = device->api();
  size_t granularity = 0;
  Status status = device->context().call("cuMemGetAllocationGranularity", [&] {
    return api.mem_granularity(&granularity, &properties, cuda::kGranularityMinimum);
  });
  if (!status.ok()) return status;
  const auto step = static_cast<int64_t>(granularity == 0 ? 1 : granularity);
  made->bytes_ = (bytes + step - 1) / step * step;
  status = device->context().call(of_bytes("cuMemCreate", made->bytes_), [&] {
    return api.mem_create(&made->handle_, static_cast<size_t>(made->bytes_), &properties, 0);
  });
  if (!status.ok()) return status;
  made->has_handle_ = true;
  if (status = made->map(); !status.ok()) return status;
  *memory = std::move(made);
  return Status::Ok();
}

Status MappedMemory::import(std::shared_ptr<CudaDevice> device, int fd, int64_t bytes,
                            std::unique_ptr<DeviceMemory>* memory) {
  std::unique_ptr<MappedMemory> made(new MappedMemory(device));
  made->bytes_ = bytes;
  Status status = device->context().call("cuMemImportFromShareableHandle", [&] {
    void* shareable = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
    return device->api().mem_import(&made->handle_, shareable, cuda::kHandlePosixFileDescriptor);
  });
  if (!status.ok()) return status;
  made->has_handle_ = true;
  if (status = made->map(); !status.ok()) return status;
  *memory = std::move(made);
  return Status::Ok();
}

Status MappedMemory::map() {
  const cuda::Api& api = device_->api();
  const auto size = static_cast<size_t>(bytes_);
  cuda::DevicePointer reserved = 0;
  Status status = device_->context().call(of_bytes("cuMemAddressReserve", bytes_), [&] {
    return api.address_reserve(&reserved, size, 0, 0, 0);
  });
  if (!status.ok()) return status;
  address_ = reserved;
  status = device_->context().call("cuMemMap",
                                   [&] { return api.mem_map(address_, size, 0, handle_, 0); });
  if (!status.ok()) return status;
  is_mapped_ = true;
  if (status = device_->admit_mapped(this); !status.ok()) return status;
  is_admitted_ = true;
  return Status::Ok();
}

cuda::Result MappedMemory::open_to(const std::vector<cuda::DeviceOrdinal>& devices) {
  std::vector<cuda::AccessDescriptor> access;
  for (const cuda::DeviceOrdinal ordinal : devices) {
    access.push_back({{cuda::kLocationDevice, ordinal}, cuda::kAccessReadWrite});
  }
  return device_->api().mem_set_access(address_, static_cast<size_t>(bytes_), access.data(),
                                       access.size());
}

cuda::Result MappedMemory::export_fd(int* fd) const {
  return device_->api().mem_export(fd, handle_, cuda::kHandlePosixFileDescriptor, 0);
}

MappedMemory::~MappedMemory() {
  const cuda::Api& api = device_->api();
  CudaContext& context = device_->context();
  const auto size = static_cast<size_t>(bytes_);
  if (is_admitted_) device_->dismiss_mapped(this);
  if (is_mapped_) context.release("cuMemUnmap", [&] { return api.mem_unmap(address_, size); });
  if (address_ != 0) {
    context.release("cuMemAddressFree", [&] { return api.address_free(address_, size); });
  }
  if (has_handle_) context.release("cuMemRelease", [&] { return api.mem_release(handle_); });
}

Status ForeignMemory::open(std::shared_ptr<CudaDevice> device, const cuda::IpcMemHandle& handle,
                           int64_t offset, int64_t bytes, std::unique_ptr<DeviceMemory>* memory) {
  cuda::DevicePointer base = 0;
  Status status = device->context().call("cuIpcOpenMemHandle", [&] {
    return device->api().ipc_open_mem(&base, handle, cuda::kIpcLazyEnablePeerAccess);
  });
  if (!status.ok()) return status;
  memory->reset(new ForeignMemory(std::move(device), base, offset, bytes));
  return Status::Ok();
}

ForeignMemory::~ForeignMemory() {
  device_->context().release("cuIpcCloseMemHandle",
                             [this] { return device_->api().ipc_close_mem(base_); });
}

}  // namespace kvx
