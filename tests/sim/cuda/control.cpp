#include "control.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string_view>

#include "copies.h"
#include "simulation.h"

namespace {

using kvx::sim::Convictions;
using kvx::sim::EngineSettings;
using kvx::sim::Simulation;
using kvx::sim::simulation;

// Changes a setting under the lock, and wakes whoever may have waited for that.
template <typename Change>
void change(Change apply) {
  Simulation& sim = simulation();
  std::lock_guard lock(sim.mutex);
  apply(sim);
  sim.changed.notify_all();
}

template <typename Change>
void change_engine(int engine, Change apply) {
  change([&](Simulation& sim) { apply(sim.devices.engines.at(static_cast<size_t>(engine))); });
}

int64_t count_of(const Simulation& sim, std::string_view name) {
  const struct {
    std::string_view name;
    uint64_t count;
  } counts[] = {
      {"launches", sim.counters.launches},
      {"copies", sim.counters.copies},
      {"batch_calls", sim.counters.batch_calls},
      {"pageable_copies", sim.counters.pageable_copies},
      {"bytes_h2d", sim.counters.bytes_h2d},
      {"bytes_d2h", sim.counters.bytes_d2h},
      {"bytes_d2d", sim.counters.bytes_d2d},
      {"live_allocations", sim.memory.live_allocations()},
      {"live_registrations", sim.memory.live_registrations()},
      {"live_streams", sim.streams.live_streams()},
      {"live_events", sim.streams.events.size()},
      {"tracked_accesses", sim.races.size()},
  };
  for (const auto& entry : counts) {
    if (entry.name == name) return static_cast<int64_t>(entry.count);
  }
  return -1;
}

// Hands the bytes of device memory to `use`; 1 when the range is none.
template <typename Use>
int access_device(uint64_t address, size_t bytes, bool is_write, const char* symbol, Use use) {
  Simulation& sim = simulation();
  std::lock_guard lock(sim.mutex);
  const auto memory = sim.memory.find(address);
  if (memory == nullptr || !memory->is_mapped(address - memory->address, bytes)) return 1;
  sim.races.add_host(address, bytes, is_write, symbol, sim.convictions);
  use(memory->alias + (address - memory->address));
  return 0;
}

}  // namespace

void kvxsim_reset() { simulation().reset(); }

void kvxsim_set_devices(int count) {
  change([&](Simulation& sim) { sim.devices.count = std::clamp(count, 0, kvx::sim::kDevicesMax); });
}

void kvxsim_set_total_memory(size_t bytes) {
  change([&](Simulation& sim) { sim.devices.total_bytes = bytes; });
}

void kvxsim_set_attribute(int attribute, int value) {
  change([&](Simulation& sim) { sim.devices.attributes[attribute] = value; });
}

void kvxsim_set_driver_version(int version) {
  change([&](Simulation& sim) { sim.driver_version = version; });
}

void kvxsim_set_bandwidth(int engine, uint64_t bytes_per_s) {
  change_engine(engine, [&](EngineSettings& settings) { settings.bytes_per_s = bytes_per_s; });
}

void kvxsim_set_latency(int engine, uint64_t nanoseconds) {
  change_engine(engine, [&](EngineSettings& settings) {
    settings.latency = std::chrono::nanoseconds(nanoseconds);
  });
}

void kvxsim_set_shuffle_seed(uint64_t seed) {
  change([&](Simulation& sim) { sim.shuffle_seed = seed; });
}

void kvxsim_set_has_batch_copy(int has) {
  change([&](Simulation& sim) { sim.has_batch_copy = has != 0; });
}

void kvxsim_set_has_stream_values(int has) {
  change([&](Simulation& sim) { sim.has_stream_values = has != 0; });
}

void kvxsim_set_has_peer_access(int has) {
  change([&](Simulation& sim) { sim.devices.has_peer_access = has != 0; });
}

void kvxsim_inject(const char* symbol, uint64_t nth, int result, int is_sticky) {
  change([&](Simulation& sim) { sim.faults.inject(symbol, nth, {result, is_sticky != 0}); });
}

void kvxsim_delay(const char* symbol, uint64_t microseconds) {
  change(
      [&](Simulation& sim) { sim.faults.delay(symbol, std::chrono::microseconds(microseconds)); });
}

void kvxsim_freeze(int engine, int is_frozen) {
  change_engine(engine, [&](EngineSettings& settings) { settings.is_frozen = is_frozen != 0; });
}

void kvxsim_fail_context(int device, int result) {
  change([&](Simulation& sim) { sim.devices.all.at(static_cast<size_t>(device)).sticky = result; });
}

uint64_t kvxsim_convictions_count() {
  Simulation& sim = simulation();
  std::lock_guard lock(sim.mutex);
  return sim.convictions.all().size();
}

int64_t kvxsim_conviction(uint64_t index, char* text, size_t bytes) {
  Simulation& sim = simulation();
  std::lock_guard lock(sim.mutex);
  if (index >= sim.convictions.all().size()) return -1;
  const kvx::sim::Conviction& conviction = sim.convictions.all()[index];
  const std::string whole = conviction.kind + ": " + conviction.text;
  if (bytes > 0) {
    const size_t written = std::min(bytes - 1, whole.size());
    std::memcpy(text, whole.data(), written);
    text[written] = '\0';
  }
  return static_cast<int64_t>(whole.size());
}

void kvxsim_clear_convictions() {
  change([](Simulation& sim) { sim.convictions.clear(); });
}

int64_t kvxsim_count(const char* name) {
  Simulation& sim = simulation();
  std::lock_guard lock(sim.mutex);
  return count_of(sim, name);
}

int kvxsim_copy_to_device(uint64_t target, const void* source, size_t bytes) {
  return access_device(target, bytes, true, __func__,
                       [&](uint8_t* memory) { std::memcpy(memory, source, bytes); });
}

int kvxsim_copy_from_device(void* target, uint64_t source, size_t bytes) {
  return access_device(source, bytes, false, __func__,
                       [&](const uint8_t* memory) { std::memcpy(target, memory, bytes); });
}

int kvxsim_memset(uint64_t target, int value, size_t bytes) {
  return access_device(target, bytes, true, __func__,
                       [&](uint8_t* memory) { std::memset(memory, value, bytes); });
}

void kvxsim_host_access(const void* address, size_t bytes, int is_write) {
  Simulation& sim = simulation();
  std::lock_guard lock(sim.mutex);
  sim.races.add_host(reinterpret_cast<uint64_t>(address), bytes, is_write != 0, "an access",
                     sim.convictions);
}
