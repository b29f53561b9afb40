// Memory shared with other processes and other devices.
#include <algorithm>
#include <cstring>

#include "device/cuda_device.h"
#include "device/cuda_memory.h"

namespace kvx {

namespace {

// What travels for plain memory. The driver's handle names a whole allocation; where ours begins
// inside it is not part of the handle.
struct PlainHandle {
  cuda::IpcMemHandle handle;
  int64_t offset = 0;
  int64_t bytes = 0;
};
static_assert(sizeof(PlainHandle) == 80);

constexpr const char* kWayOut =
    "; allocate it with cuMemAlloc (cudaMalloc, torch without expandable_segments) or as "
    "kvx device memory, or lease it with staged=True";

Status in_several_allocations() {
  return {Code::kUnavailable,
          std::string("the memory lies in several allocations, as expandable segments do, which "
                      "cannot be shared as one") +
              kWayOut};
}

Status from_a_pool() {
  return {Code::kUnavailable,
          std::string("the memory comes from a stream-ordered pool (cudaMallocAsync), which has no "
                      "handle that another process could open") +
              kWayOut};
}

Status not_made_for_sharing() {
  return {Code::kUnavailable,
          std::string("the memory was mapped without a descriptor to share it by, as expandable "
                      "segments may be") +
              kWayOut};
}

Status not_of_this_device() {
  return {Code::kUsage, "this memory was not allocated by this device"};
}

}  // namespace

Status CudaDevice::share(const DeviceMemory& memory, SharedMemoryHandle* handle) {
  if (const auto* mapped = dynamic_cast<const MappedMemory*>(&memory); mapped != nullptr) {
    if (&mapped->device() != this) return not_of_this_device();
    int fd = -1;
    Status status =
        context_->call("cuMemExportToShareableHandle", [&] { return mapped->export_fd(&fd); });
    if (status.ok()) *handle = {{}, fd, mapped->bytes()};
    return status;
  }
  const auto* plain = dynamic_cast<const PlainMemory*>(&memory);
  if (plain == nullptr || &plain->device() != this) return not_of_this_device();
  PlainHandle made;
  cuda::DevicePointer base = 0;
  size_t size = 0;
  Status status = context_->call("cuMemGetAddressRange", [&] {
    return api().mem_address_range(&base, &size, plain->address());
  });
  if (!status.ok()) return status;
  status = context_->call("cuIpcGetMemHandle",
                          [&] { return api().ipc_get_mem(&made.handle, plain->address()); });
  if (!status.ok()) return status;
  made.offset = static_cast<int64_t>(plain->address() - base);
  made.bytes = plain->bytes();
  handle->bytes.resize(sizeof(made));
  std::memcpy(handle->bytes.data(), &made, sizeof(made));
  handle->fd = -1;
  handle->size_bytes = plain->bytes();
  return Status::Ok();
}

Status CudaDevice::share_at(uint64_t address, int64_t bytes, SharedMemoryHandle* handle,
                            int64_t* offset) {
  int64_t there_bytes = 0;
  if (Status status = check_address(address, &there_bytes); !status.ok()) return status;
  cuda::DevicePointer base = 0;
  size_t size = 0;
  int is_plain = 0;
  Status status = context_->call("cuMemGetAddressRange", [&] {
    const cuda::Result result = api().mem_address_range(&base, &size, address);
    if (result != cuda::kSuccess) return result;
    return api().pointer_attribute(&is_plain, cuda::kPointerLegacyIpcCapable, address);
  });
  if (!status.ok()) return status;
  *offset = static_cast<int64_t>(address - base);
  if (static_cast<int64_t>(size) - *offset < bytes) return in_several_allocations();
  return is_plain != 0 ? share_plain(base, static_cast<int64_t>(size), handle)
                       : share_mapped(base, static_cast<int64_t>(size), handle);
}

Status CudaDevice::share_plain(uint64_t base, int64_t bytes, SharedMemoryHandle* handle) {
  PlainHandle made;
  Status status =
      context_->call("cuIpcGetMemHandle", [&] { return api().ipc_get_mem(&made.handle, base); });
  if (!status.ok()) return status;
  made.bytes = bytes;
  handle->bytes.resize(sizeof(made));
  std::memcpy(handle->bytes.data(), &made, sizeof(made));
  handle->fd = -1;
  handle->size_bytes = bytes;
  return Status::Ok();
}

// Memory that was put into a range of addresses can be shared if it was made for that.
Status CudaDevice::share_mapped(uint64_t base, int64_t bytes, SharedMemoryHandle* handle) {
  const ContextScope scope(*context_);
  if (scope.result() != cuda::kSuccess) return context_->check("cuCtxPushCurrent", scope.result());
  cuda::AllocationHandle allocation = 0;
  cuda::Result result = api().mem_retain(&allocation, reinterpret_cast<void*>(base));
  if (result == cuda::kErrorInvalidValue || result == cuda::kErrorNotSupported) {
    return from_a_pool();
  }
  if (result != cuda::kSuccess) return context_->check("cuMemRetainAllocationHandle", result);
  int fd = -1;
  result = api().mem_export(&fd, allocation, cuda::kHandlePosixFileDescriptor, 0);
  context_->release("cuMemRelease", [&] { return api().mem_release(allocation); });
  if (result == cuda::kErrorInvalidValue || result == cuda::kErrorNotSupported ||
      result == cuda::kErrorNotPermitted) {
    return not_made_for_sharing();
  }
  if (result != cuda::kSuccess) return context_->check("cuMemExportToShareableHandle", result);
  *handle = {{}, fd, bytes};
  return Status::Ok();
}

Status CudaDevice::can_reach(int ordinal) {
  if (ordinal == context_->device()) return Status::Ok();
  int can_access = 0;
  Status status = context_->call("cuDeviceCanAccessPeer", [&] {
    return api().device_can_access_peer(&can_access, context_->device(), ordinal);
  });
  if (!status.ok() || can_access != 0) return status;
  return {Code::kUnavailable, "device " + std::to_string(context_->device()) +
                                  " cannot reach the memory of device " + std::to_string(ordinal)};
}

Status CudaDevice::open_shared(const SharedMemoryHandle& handle,
                               std::unique_ptr<DeviceMemory>* memory) {
  if (handle.size_bytes <= 0) return {Code::kUsage, "shared memory has size_bytes > 0"};
  if (handle.bytes.empty()) {
    if (handle.fd < 0) return {Code::kUsage, "this handle has neither bytes nor a descriptor"};
    return MappedMemory::import(shared_from_this(), handle.fd, handle.size_bytes, memory);
  }
  PlainHandle given;
  if (handle.bytes.size() != sizeof(given)) {
    return {Code::kUsage, "a handle of plain memory has " + std::to_string(sizeof(given)) +
                              " bytes, not " + std::to_string(handle.bytes.size())};
  }
  std::memcpy(&given, handle.bytes.data(), sizeof(given));
  if (given.offset < 0 || given.bytes != handle.size_bytes) {
    return {Code::kUsage, "this handle contradicts itself: it was not made by share()"};
  }
  return ForeignMemory::open(shared_from_this(), given.handle, given.offset, given.bytes, memory);
}

Status CudaDevice::admit_mapped(MappedMemory* memory) {
  std::lock_guard lock(mutex_);
  std::vector<cuda::DeviceOrdinal> devices = peers_;
  devices.push_back(context_->device());
  Status status = context_->call("cuMemSetAccess", [&] { return memory->open_to(devices); });
  if (status.ok()) mapped_.push_back(memory);
  return status;
}

void CudaDevice::dismiss_mapped(MappedMemory* memory) noexcept {
  std::lock_guard lock(mutex_);
  std::erase(mapped_, memory);
}

Status CudaDevice::open_to(cuda::DeviceOrdinal peer) {
  std::lock_guard lock(mutex_);
  for (MappedMemory* memory : mapped_) {
    Status status = context_->call("cuMemSetAccess", [&] { return memory->open_to({peer}); });
    if (!status.ok()) return status;
  }
  if (std::find(peers_.begin(), peers_.end(), peer) == peers_.end()) peers_.push_back(peer);
  return Status::Ok();
}

Status CudaDevice::enable_peer(Device& peer) {
  auto* other = dynamic_cast<CudaDevice*>(&peer);
  if (other == nullptr) return {Code::kUnavailable, "the peer is no CUDA device"};
  if (other->context().device() == context_->device()) {
    return {Code::kUsage, "a device is no peer of itself"};
  }
  struct Way {
    CudaDevice* user;
    CudaDevice* owner;
  };
  for (const Way way : {Way{this, other}, Way{other, this}}) {
    CudaContext& context = way.user->context();
    int can_access = 0;
    Status status = context.call("cuDeviceCanAccessPeer", [&] {
      return api().device_can_access_peer(&can_access, context.device(),
                                          way.owner->context().device());
    });
    if (!status.ok()) return status;
    if (can_access == 0) {
      return {Code::kUnavailable, "device " + way.user->info().pci_bus_id +
                                      " cannot reach the memory of device " +
                                      way.owner->info().pci_bus_id};
    }
    status = context.call("cuCtxEnablePeerAccess", [&] {
      const cuda::Result result = api().context_enable_peer(way.owner->context().handle(), 0);
      return result == cuda::kErrorPeerAccessAlreadyEnabled ? cuda::kSuccess : result;
    });
    if (!status.ok()) return status;
    if (status = way.owner->open_to(context.device()); !status.ok()) return status;
  }
  return Status::Ok();
}

}  // namespace kvx
