#include "device/cuda_info.h"

#include <array>
#include <cctype>
#include <fstream>

namespace kvx {

namespace {

std::string hexadecimal(const cuda::Uuid& uuid) {
  static constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  for (const char byte : uuid.bytes) {
    const auto value = static_cast<unsigned char>(byte);
    text += kDigits[value >> 4];
    text += kDigits[value & 15];
  }
  return text;
}

// Older drivers do not know the attribute; the kernel always knows where the slot is.
int numa_node_of(const cuda::Api& api, cuda::DeviceOrdinal device, std::string bus_id) {
  int node = -1;
  if (api.device_attribute(&node, cuda::kAttributeHostNumaId, device) == cuda::kSuccess &&
      node >= 0) {
    return node;
  }
  for (char& letter : bus_id) {
    letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  }
  std::ifstream file("/sys/bus/pci/devices/" + bus_id + "/numa_node");
  node = -1;
  return file >> node ? node : -1;
}

}  // namespace

Status describe_device(const cuda::Driver& driver, int ordinal, DeviceInfo* info) {
  const cuda::Api& api = driver.api;
  cuda::DeviceOrdinal device = 0;
  cuda::Result result = api.device_get(&device, ordinal);
  if (result != cuda::kSuccess) return cuda::failure(api, "cuDeviceGet", result);

  std::array<char, 256> name{};
  std::array<char, 32> bus_id{};
  cuda::Uuid uuid;
  size_t total_bytes = 0;
  result = api.device_name(name.data(), static_cast<int>(name.size()) - 1, device);
  if (result == cuda::kSuccess) result = api.device_uuid(&uuid, device);
  if (result == cuda::kSuccess) result = api.device_total_mem(&total_bytes, device);
  if (result == cuda::kSuccess) {
    result = api.device_pci_bus_id(bus_id.data(), static_cast<int>(bus_id.size()) - 1, device);
  }
  int can_map = 0;
  int can_export = 0;
  const struct {
    int attribute;
    int* value;
  } wanted[] = {
      {cuda::kAttributeComputeCapabilityMajor, &info->compute_major},
      {cuda::kAttributeComputeCapabilityMinor, &info->compute_minor},
      {cuda::kAttributeMultiprocessorCount, &info->multiprocessors},
      {cuda::kAttributeAsyncEngineCount, &info->copy_engines},
      {cuda::kAttributeVirtualMemoryManagement, &can_map},
      {cuda::kAttributePosixFileDescriptorHandles, &can_export},
  };
  for (const auto& want : wanted) {
    if (result != cuda::kSuccess) break;
    result = api.device_attribute(want.value, want.attribute, device);
  }
  if (result != cuda::kSuccess) return cuda::failure(api, "asking about the device", result);

  info->ordinal = ordinal;
  info->name = name.data();
  info->uuid = hexadecimal(uuid);
  info->pci_bus_id = bus_id.data();
  info->total_bytes = static_cast<int64_t>(total_bytes);
  info->numa_node = numa_node_of(api, device, info->pci_bus_id);
  info->driver_version = driver.version;
  info->has_batch_copy = api.memcpy_batch_async != nullptr;
  info->has_exportable_memory = can_map != 0 && can_export != 0;
  info->has_stream_values = api.stream_wait_value != nullptr;
  return Status::Ok();
}

}  // namespace kvx
