// Virtual memory: a range of addresses, memory without an address, and the one put into the other.
#include <algorithm>

#include "copies.h"
#include "entry_points.h"
#include "simulation.h"

namespace kvx::sim {

extern "C" {

Result cuMemGetAllocationGranularity(size_t* bytes, const AllocationProperties* properties,
                                     int option) {
  KVX_SIM_ENTER(call)
  const bool is_known = option == kGranularityMinimum || option == kGranularityMinimum + 1;
  if (bytes == nullptr || properties == nullptr || !is_known) return kErrorInvalidValue;
  *bytes = kGranularityBytes;
  return kSuccess;
}

Result cuMemAddressReserve(DevicePointer* pointer, size_t bytes, size_t alignment,
                           DevicePointer /*hint*/, unsigned long long flags) {
  KVX_SIM_ENTER(call)
  const bool is_power = (alignment & (alignment - 1)) == 0;
  if (pointer == nullptr || bytes == 0 || bytes % kGranularityBytes != 0 || !is_power ||
      flags != 0) {
    return kErrorInvalidValue;
  }
  const auto memory = call->memory.reserve(bytes, std::max(alignment, kGranularityBytes),
                                           call.device(), ReservationKind::kVirtual);
  if (memory == nullptr) return kErrorOutOfMemory;
  *pointer = memory->address;
  return kSuccess;
}

Result cuMemAddressFree(DevicePointer pointer, size_t bytes) {
  KVX_SIM_ENTER(call)
  const auto memory = call->memory.find(pointer);
  const bool is_whole = memory != nullptr && memory->kind == ReservationKind::kVirtual &&
                        memory->address == pointer && memory->bytes == bytes;
  if (!is_whole || !memory->mappings.empty()) return kErrorInvalidValue;
  call->memory.remove(*memory);
  return kSuccess;
}

Result cuMemCreate(AllocationHandle* handle, size_t bytes, const AllocationProperties* properties,
                   unsigned long long flags) {
  KVX_SIM_ENTER(call)
  if (handle == nullptr || properties == nullptr || flags != 0) return kErrorInvalidValue;
  const bool is_sound = properties->type == kAllocationPinned &&
                        properties->location.type == kLocationDevice && bytes != 0 &&
                        bytes % kGranularityBytes == 0;
  if (!is_sound) return kErrorInvalidValue;
  Device* device = call->devices.find(properties->location.id);
  if (device == nullptr) return kErrorInvalidDevice;
  auto backing = create_backing(*device, bytes, call->devices.total_bytes);
  if (backing == nullptr) return kErrorOutOfMemory;
  backing->is_exportable = (properties->handle_types & kHandlePosixFileDescriptor) != 0;
  *handle = call->memory.next_handle++;
  call->memory.handles[*handle] = std::move(backing);
  return kSuccess;
}

Result cuMemRelease(AllocationHandle handle) {
  KVX_SIM_ENTER(call)
  return call->memory.handles.erase(handle) == 1 ? kSuccess : kErrorInvalidValue;
}

Result cuMemMap(DevicePointer pointer, size_t bytes, size_t offset, AllocationHandle handle,
                unsigned long long flags) {
  KVX_SIM_ENTER(call)
  const auto memory = call->memory.find(pointer);
  const auto found = call->memory.handles.find(handle);
  if (memory == nullptr || memory->kind != ReservationKind::kVirtual || offset != 0 || flags != 0 ||
      found == call->memory.handles.end() || found->second->bytes != bytes) {
    return kErrorInvalidValue;
  }
  const size_t at = pointer - memory->address;
  if (at % kGranularityBytes != 0 || bytes > memory->bytes - at) return kErrorInvalidValue;
  const auto next = memory->mappings.lower_bound(at);
  const bool is_free = memory->find(at) == memory->mappings.end() &&
                       (next == memory->mappings.end() || next->first >= at + bytes);
  if (!is_free) return kErrorInvalidValue;
  return memory->map(at, found->second, 0) ? kSuccess : kErrorOutOfMemory;
}

Result cuMemUnmap(DevicePointer pointer, size_t bytes) {
  KVX_SIM_ENTER(call)
  const auto memory = call->memory.find(pointer);
  if (memory == nullptr || memory->kind != ReservationKind::kVirtual) return kErrorInvalidValue;
  const size_t start = pointer - memory->address;
  // Whole mappings only, without gaps.
  size_t at = start;
  while (at < start + bytes) {
    const auto mapping = memory->mappings.find(at);
    if (mapping == memory->mappings.end()) return kErrorInvalidValue;
    at += mapping->second.bytes;
  }
  if (bytes == 0 || at != start + bytes) return kErrorInvalidValue;
  quiesce(call, pointer, bytes);
  for (at = start; at < start + bytes;) {
    const size_t size = memory->mappings.at(at).bytes;
    memory->unmap(at);
    at += size;
  }
  return kSuccess;
}

Result cuMemSetAccess(DevicePointer pointer, size_t bytes, const AccessDescriptor* access,
                      size_t count) {
  KVX_SIM_ENTER(call)
  const auto memory = call->memory.find(pointer);
  if (memory == nullptr || memory->kind != ReservationKind::kVirtual || access == nullptr) {
    return kErrorInvalidValue;
  }
  const size_t start = pointer - memory->address;
  if (!memory->is_mapped(start, bytes)) return kErrorInvalidValue;
  for (size_t i = 0; i < count; ++i) {
    const bool is_device = access[i].location.type == kLocationDevice &&
                           call->devices.find(access[i].location.id) != nullptr;
    if (!is_device) return kErrorInvalidDevice;
    const uint32_t bit = 1u << access[i].location.id;
    for (auto& [at, mapping] : memory->mappings) {
      if (at + mapping.bytes <= start || at >= start + bytes) continue;
      mapping.access &= ~bit;
      if (access[i].flags == kAccessReadWrite) mapping.access |= bit;
    }
  }
  return kSuccess;
}

}  // extern "C"

}  // namespace kvx::sim
