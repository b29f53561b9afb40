// The simulated devices, their primary contexts and their copy engines. A context is its device:
// kvx uses primary contexts only. Everything is guarded by Simulation::mutex.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>

#include "shim/cuda/abi.h"

namespace kvx::sim {

using cuda::Result;

inline constexpr int kDevicesMax = 8;
inline constexpr size_t kDefaultTotalBytes = size_t{9112} << 20;

struct StreamState;

// Copies between host and device occupy their direction's engine, all else the third.
enum class Engine { kHostToDevice, kDeviceToHost, kOnDevice };
inline constexpr size_t kEngines = 3;

struct EngineState {
  bool is_busy = false;
  int waiting = 0;
};

struct EngineSettings {
  uint64_t bytes_per_s = 0;  // 0: no delay
  std::chrono::nanoseconds latency{0};
  bool is_frozen = false;
};

struct Device {
  int ordinal = 0;
  int retained = 0;
  // The error that this context has died of; a context is alive again when it was released.
  Result sticky = cuda::kSuccess;
  size_t used_bytes = 0;
  std::set<int> peers;
  std::array<EngineState, kEngines> engines;
  // Made when somebody uses the NULL stream, which is a conviction.
  std::shared_ptr<StreamState> legacy_stream;
};

struct Devices {
  Devices();
  void reset();
  [[nodiscard]] Device* find(int ordinal);
  // Null for what is no context of a simulated device.
  [[nodiscard]] Device* find(cuda::Context context);
  static cuda::Context context_of(Device& device);

  int count = 1;
  bool has_peer_access = true;
  size_t total_bytes = kDefaultTotalBytes;
  std::map<int, int> attributes;  // set by a test, in place of the defaults
  std::array<Device, kDevicesMax> all;
  std::array<EngineSettings, kEngines> engines;
};

// The context that is current on this thread; null for none.
Device* current_device();

}  // namespace kvx::sim
