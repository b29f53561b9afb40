// The one simulated driver of this process, and the guard with which every entry point begins.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>

#include "devices.h"
#include "faults.h"
#include "memory.h"
#include "modules.h"
#include "races.h"
#include "streams.h"

namespace kvx::sim {

inline constexpr int kDefaultDriverVersion = 13000;
inline constexpr uint64_t kDefaultShuffleSeed = 1;

struct Simulation {
  std::mutex mutex;  // guards everything below; not held while bytes move or a kernel runs
  // Signalled when an operation, a copy or a stream ended, or a setting changed.
  std::condition_variable changed;

  bool is_initialized = false;
  int driver_version = kDefaultDriverVersion;
  bool has_batch_copy = true;
  bool has_stream_values = true;
  uint64_t shuffle_seed = kDefaultShuffleSeed;
  // Set while a reset throws away what is queued.
  bool is_abandoning = false;

  Devices devices;
  Memory memory;
  Streams streams;
  Modules modules;
  RaceDetector races;
  Faults faults;
  Convictions convictions;
  Counters counters;

  // Ends every stream and forgets everything; nobody may be inside the driver meanwhile.
  void reset();
};

// Never destroyed: threads of streams may outlive static destructors.
Simulation& simulation();

// Guards one call of an entry point: takes the lock, counts the call, applies injected faults,
// refuses it without cuInit, without the context it needs or after a sticky error.
class Call {
 public:
  // REQUIRES: `symbol` lives for ever; it is the name of the entry point.
  explicit Call(const char* symbol);

  [[nodiscard]] bool is_refused() const { return refusal_ != cuda::kSuccess; }
  [[nodiscard]] Result refusal() const { return refusal_; }
  [[nodiscard]] const char* symbol() const { return symbol_; }
  // REQUIRES: the entry point needs a context, and the call was not refused.
  [[nodiscard]] Device& device() { return *device_; }
  [[nodiscard]] std::unique_lock<std::mutex>& lock() { return lock_; }

  Simulation* operator->() { return &simulation_; }

  // Kills the context: 700 and a conviction.
  Result illegal_address(std::string_view kind, std::string text);

 private:
  const char* symbol_;
  Simulation& simulation_;
  std::unique_lock<std::mutex> lock_;
  Device* device_;
  Result refusal_;
};

// The first lines of every entry point.
#define KVX_SIM_ENTER(call) \
  Call call(__func__);      \
  if (call.is_refused()) {  \
    return call.refusal();  \
  }

// Handles are numbers in the shape of pointers: one that was destroyed is found out.
template <typename Handle>
Handle handle_of(uint64_t number) {
  return reinterpret_cast<Handle>(number);
}
template <typename Handle>
uint64_t number_of(Handle handle) {
  return reinterpret_cast<uint64_t>(handle);
}

}  // namespace kvx::sim
