// Device allocations, registered host memory, and what a pointer is.
#include <algorithm>

#include "copies.h"
#include "entry_points.h"
#include "simulation.h"

namespace kvx::sim {

namespace {

// One registration of 512 GiB or more fails on current drivers.
constexpr size_t kRegistrationBytesMax = size_t{512} << 30;

Result describe_device(const Reservation& memory, int attribute, void* value) {
  switch (attribute) {
    case kPointerMemoryType:
      *static_cast<unsigned*>(value) = kMemoryTypeDevice;
      return kSuccess;
    case kPointerDeviceOrdinal:
      *static_cast<int*>(value) = memory.device.ordinal;
      return kSuccess;
    case kPointerRangeStart:
      *static_cast<DevicePointer*>(value) = memory.address;
      return kSuccess;
    case kPointerRangeSize:
      *static_cast<size_t*>(value) = memory.bytes;
      return kSuccess;
    case kPointerLegacyIpcCapable:
      *static_cast<int*>(value) = memory.kind == ReservationKind::kAllocated ? 1 : 0;
      return kSuccess;
    default:
      return kErrorInvalidValue;
  }
}

Result describe_host(const Registration& registration, int attribute, void* value) {
  switch (attribute) {
    case kPointerMemoryType:
      *static_cast<unsigned*>(value) = kMemoryTypeHost;
      return kSuccess;
    case kPointerRangeStart:
      *static_cast<DevicePointer*>(value) = registration.address;
      return kSuccess;
    case kPointerRangeSize:
      *static_cast<size_t*>(value) = registration.bytes;
      return kSuccess;
    case kPointerDeviceOrdinal:
    case kPointerLegacyIpcCapable:
      *static_cast<int*>(value) = 0;
      return kSuccess;
    default:
      return kErrorInvalidValue;
  }
}

}  // namespace

void quiesce(Call& call, uint64_t address, size_t bytes) {
  const auto conviction_count = call->convictions.all().size();
  call->races.remove(address, bytes, call.symbol(), call->convictions);
  const bool has_waited =
      call->streams.wait_until_untouched(*call.operator->(), call.lock(), address, bytes);
  if (has_waited && call->convictions.all().size() == conviction_count) {
    call->convictions.add("free_in_flight", std::string(call.symbol()) + " of " +
                                                range_text(address, bytes) +
                                                " while a queued operation touches it");
  }
  // The wait has ordered them: what they left behind is no race of whoever comes next.
  Convictions ignored;
  call->races.remove(address, bytes, call.symbol(), ignored);
}

extern "C" {

Result cuMemAlloc(DevicePointer* pointer, size_t bytes) {
  KVX_SIM_ENTER(call)
  if (pointer == nullptr || bytes == 0) return kErrorInvalidValue;
  Device& device = call.device();
  auto backing = create_backing(device, bytes, call->devices.total_bytes);
  if (backing == nullptr) return kErrorOutOfMemory;
  auto memory =
      call->memory.reserve(bytes, kAllocationAlignment, device, ReservationKind::kAllocated);
  if (memory == nullptr) return kErrorOutOfMemory;
  if (!memory->map(0, std::move(backing), ~0u)) {
    call->memory.remove(*memory);
    return kErrorOutOfMemory;
  }
  *pointer = memory->address;
  return kSuccess;
}

Result cuMemFree(DevicePointer pointer) {
  KVX_SIM_ENTER(call)
  const auto memory = call->memory.find(pointer);
  const bool is_allocation = memory != nullptr && memory->address == pointer &&
                             memory->kind == ReservationKind::kAllocated;
  if (!is_allocation) return kErrorInvalidValue;
  quiesce(call, memory->address, memory->bytes);
  call->memory.remove(*memory);
  return kSuccess;
}

Result cuMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  KVX_SIM_ENTER(call)
  const size_t total = call->devices.total_bytes;
  *total_bytes = total;
  *free_bytes = total - std::min(total, call.device().used_bytes);
  return kSuccess;
}

Result cuMemGetAddressRange(DevicePointer* base, size_t* bytes, DevicePointer pointer) {
  KVX_SIM_ENTER(call)
  const auto memory = call->memory.find(pointer);
  if (memory == nullptr) return kErrorInvalidValue;
  const auto mapping = memory->find(pointer - memory->address);
  if (mapping == memory->mappings.end()) return kErrorInvalidValue;
  if (base != nullptr) *base = memory->address + mapping->first;
  if (bytes != nullptr) *bytes = mapping->second.bytes;
  return kSuccess;
}

Result cuMemHostRegister(void* address, size_t bytes, unsigned /*flags*/) {
  KVX_SIM_ENTER(call)
  const auto start = reinterpret_cast<uint64_t>(address);
  if (address == nullptr || bytes == 0 || bytes >= kRegistrationBytesMax) return kErrorInvalidValue;
  if (call->memory.registration_in(start, bytes) != nullptr) {
    return kErrorHostMemoryAlreadyRegistered;
  }
  if (call->memory.is_device_address(start) || !is_host_memory(start, bytes)) {
    return kErrorInvalidValue;
  }
  call->memory.add(Registration{start, bytes});
  return kSuccess;
}

Result cuMemHostUnregister(void* address) {
  KVX_SIM_ENTER(call)
  const auto start = reinterpret_cast<uint64_t>(address);
  const Registration* found = call->memory.registration_at(start);
  if (found == nullptr || found->address != start) return kErrorHostMemoryNotRegistered;
  quiesce(call, start, found->bytes);
  call->memory.remove_registration(start);
  return kSuccess;
}

Result cuMemHostGetDevicePointer(DevicePointer* pointer, void* address, unsigned /*flags*/) {
  KVX_SIM_ENTER(call)
  const auto start = reinterpret_cast<uint64_t>(address);
  if (call->memory.registration_at(start) == nullptr) return kErrorInvalidValue;
  *pointer = start;
  return kSuccess;
}

Result cuPointerGetAttribute(void* value, int attribute, DevicePointer pointer) {
  KVX_SIM_ENTER(call)
  if (value == nullptr) return kErrorInvalidValue;
  if (const auto memory = call->memory.find(pointer); memory != nullptr) {
    return describe_device(*memory, attribute, value);
  }
  const Registration* registration = call->memory.registration_at(pointer);
  return registration == nullptr ? kErrorInvalidValue
                                 : describe_host(*registration, attribute, value);
}

}  // extern "C"

KVX_SIM_ALIAS(cuMemAlloc_v2, cuMemAlloc)
KVX_SIM_ALIAS(cuMemFree_v2, cuMemFree)
KVX_SIM_ALIAS(cuMemGetInfo_v2, cuMemGetInfo)
KVX_SIM_ALIAS(cuMemGetAddressRange_v2, cuMemGetAddressRange)
KVX_SIM_ALIAS(cuMemHostRegister_v2, cuMemHostRegister)
KVX_SIM_ALIAS(cuMemHostGetDevicePointer_v2, cuMemHostGetDevicePointer)

}  // namespace kvx::sim
