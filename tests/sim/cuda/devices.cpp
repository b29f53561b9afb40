#include "devices.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "entry_points.h"
#include "simulation.h"

namespace kvx::sim {

namespace {

std::vector<Device*>& context_stack() {
  thread_local std::vector<Device*> stack;
  return stack;
}

// The number of device 0; arbitrary, but never 0.
constexpr int kFirstBus = 0x17;

int default_attribute(int attribute, int ordinal) {
  switch (attribute) {
    case kAttributeMultiprocessorCount:
      return 132;
    case kAttributePciBusId:
      return kFirstBus + ordinal;
    case kAttributeAsyncEngineCount:
      return 3;
    case kAttributeComputeCapabilityMajor:
      return 9;
    case kAttributeUnifiedAddressing:
    case kAttributeCanUseHostPointerForRegisteredMem:
    case kAttributeVirtualMemoryManagement:
    case kAttributePosixFileDescriptorHandles:
      return 1;
    default:
      return 0;  // not integrated, PCI domain and device 0, minor 0, NUMA node 0
  }
}

}  // namespace

Devices::Devices() {
  for (int i = 0; i < kDevicesMax; ++i) all[static_cast<size_t>(i)].ordinal = i;
}

void Devices::reset() {
  count = 1;
  has_peer_access = true;
  total_bytes = kDefaultTotalBytes;
  attributes.clear();
  engines = {};
  for (Device& device : all) {
    device.retained = 0;
    device.sticky = kSuccess;
    device.peers.clear();
    device.engines = {};
    device.legacy_stream = nullptr;
  }
}

Device* Devices::find(int ordinal) {
  return ordinal >= 0 && ordinal < count ? &all[static_cast<size_t>(ordinal)] : nullptr;
}

Device* Devices::find(Context context) {
  const auto found = std::find_if(all.begin(), all.begin() + count, [context](Device& device) {
    return context_of(device) == context;
  });
  return found == all.begin() + count ? nullptr : found;
}

Context Devices::context_of(Device& device) { return reinterpret_cast<Context>(&device); }

Device* current_device() { return context_stack().empty() ? nullptr : context_stack().back(); }

extern "C" {

Result cuInit(unsigned flags) {
  KVX_SIM_ENTER(call)
  if (flags != 0) return kErrorInvalidValue;
  if (call->devices.count == 0) return kErrorNoDevice;
  call->is_initialized = true;
  return kSuccess;
}

Result cuDriverGetVersion(int* version) {
  KVX_SIM_ENTER(call)
  if (version == nullptr) return kErrorInvalidValue;
  *version = call->driver_version;
  return kSuccess;
}

Result cuDeviceGet(DeviceOrdinal* device, int ordinal) {
  KVX_SIM_ENTER(call)
  if (call->devices.find(ordinal) == nullptr) return kErrorInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

Result cuDeviceGetCount(int* count) {
  KVX_SIM_ENTER(call)
  *count = call->devices.count;
  return kSuccess;
}

Result cuDeviceGetName(char* name, int bytes, DeviceOrdinal device) {
  KVX_SIM_ENTER(call)
  if (call->devices.find(device) == nullptr) return kErrorInvalidDevice;
  std::snprintf(name, static_cast<size_t>(bytes), "kvx simulated device %d", device);
  return kSuccess;
}

Result cuDeviceGetUuid(Uuid* uuid, DeviceOrdinal device) {
  KVX_SIM_ENTER(call)
  if (call->devices.find(device) == nullptr) return kErrorInvalidDevice;
  *uuid = Uuid{};
  std::memcpy(uuid->bytes, "kvx simulated", 13);
  uuid->bytes[15] = static_cast<char>(device + 1);
  return kSuccess;
}

Result cuDeviceTotalMem(size_t* bytes, DeviceOrdinal device) {
  KVX_SIM_ENTER(call)
  if (call->devices.find(device) == nullptr) return kErrorInvalidDevice;
  *bytes = call->devices.total_bytes;
  return kSuccess;
}

Result cuDeviceGetAttribute(int* value, int attribute, DeviceOrdinal device) {
  KVX_SIM_ENTER(call)
  if (call->devices.find(device) == nullptr) return kErrorInvalidDevice;
  const auto set = call->devices.attributes.find(attribute);
  const bool is_set = set != call->devices.attributes.end();
  *value = is_set ? set->second : default_attribute(attribute, device);
  return kSuccess;
}

Result cuDeviceGetPCIBusId(char* text, int bytes, DeviceOrdinal device) {
  KVX_SIM_ENTER(call)
  if (call->devices.find(device) == nullptr) return kErrorInvalidDevice;
  std::snprintf(text, static_cast<size_t>(bytes), "0000:%02X:00.0",
                static_cast<unsigned>(kFirstBus + device));
  return kSuccess;
}

Result cuDeviceCanAccessPeer(int* can_access, DeviceOrdinal device, DeviceOrdinal peer) {
  KVX_SIM_ENTER(call)
  Devices& devices = call->devices;
  if (devices.find(device) == nullptr || devices.find(peer) == nullptr) return kErrorInvalidDevice;
  *can_access = device != peer && devices.has_peer_access ? 1 : 0;
  return kSuccess;
}

Result cuDevicePrimaryCtxRetain(Context* context, DeviceOrdinal device) {
  KVX_SIM_ENTER(call)
  Device* found = call->devices.find(device);
  if (found == nullptr) return kErrorInvalidDevice;
  ++found->retained;
  *context = Devices::context_of(*found);
  return kSuccess;
}

Result cuDevicePrimaryCtxRelease(DeviceOrdinal device) {
  KVX_SIM_ENTER(call)
  Device* found = call->devices.find(device);
  if (found == nullptr) return kErrorInvalidDevice;
  if (found->retained == 0) return kErrorInvalidContext;
  if (--found->retained == 0) found->sticky = kSuccess;
  return kSuccess;
}

Result cuCtxSetCurrent(Context context) {
  KVX_SIM_ENTER(call)
  Device* device = call->devices.find(context);
  if (context != nullptr && device == nullptr) return kErrorInvalidContext;
  std::vector<Device*>& stack = context_stack();
  if (!stack.empty()) stack.pop_back();
  if (device != nullptr) stack.push_back(device);
  return kSuccess;
}

Result cuCtxGetCurrent(Context* context) {
  KVX_SIM_ENTER(call)
  Device* device = current_device();
  *context = device == nullptr ? nullptr : Devices::context_of(*device);
  return kSuccess;
}

Result cuCtxPushCurrent(Context context) {
  KVX_SIM_ENTER(call)
  Device* device = call->devices.find(context);
  if (device == nullptr) return kErrorInvalidContext;
  context_stack().push_back(device);
  return kSuccess;
}

Result cuCtxPopCurrent(Context* context) {
  KVX_SIM_ENTER(call)
  std::vector<Device*>& stack = context_stack();
  if (stack.empty()) return kErrorInvalidContext;
  if (context != nullptr) *context = Devices::context_of(*stack.back());
  stack.pop_back();
  return kSuccess;
}

Result cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  KVX_SIM_ENTER(call)
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return kSuccess;
}

Result cuCtxEnablePeerAccess(Context peer, unsigned flags) {
  KVX_SIM_ENTER(call)
  Device* found = call->devices.find(peer);
  if (flags != 0) return kErrorInvalidValue;
  if (found == nullptr || found == &call.device()) return kErrorInvalidContext;
  const bool is_new = call.device().peers.insert(found->ordinal).second;
  return is_new ? kSuccess : kErrorPeerAccessAlreadyEnabled;
}

}  // extern "C"

KVX_SIM_ALIAS(cuDeviceGetUuid_v2, cuDeviceGetUuid)
KVX_SIM_ALIAS(cuDeviceTotalMem_v2, cuDeviceTotalMem)
KVX_SIM_ALIAS(cuDevicePrimaryCtxRelease_v2, cuDevicePrimaryCtxRelease)
KVX_SIM_ALIAS(cuCtxPushCurrent_v2, cuCtxPushCurrent)
KVX_SIM_ALIAS(cuCtxPopCurrent_v2, cuCtxPopCurrent)

}  // namespace kvx::sim
