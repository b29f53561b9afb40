// The simulated CUDA driver as the native tests see it: loaded once, steered through its controls,
// set back before every test and asked for convictions and leaks after it.
#pragma once

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "../sim/cuda/control.h"
#include "device/cuda_device.h"
#include "device_fixture.h"

namespace kvx::test {

inline constexpr const char* kSimulation = KVX_SIMULATED_CUDA;

// A control function of the simulation, by name:
// simulated<decltype(kvxsim_inject)>("kvxsim_inject").
template <typename Function>
Function* simulated(const char* name) {
  void* library = dlopen(kSimulation, RTLD_NOW | RTLD_LOCAL);
  CHECK(library != nullptr);
  void* found = dlsym(library, name);
  CHECK(found != nullptr);
  return reinterpret_cast<Function*>(found);
}
#define KVX_SIMULATED(function) (*::kvx::test::simulated<decltype(function)>(#function))

inline int64_t simulated_count(const char* name) { return KVX_SIMULATED(kvxsim_count)(name); }

// Prints what the simulation holds against us; returns how much that is.
inline uint64_t convictions() {
  const uint64_t count = KVX_SIMULATED(kvxsim_convictions_count)();
  for (uint64_t i = 0; i < count && i < 5; ++i) {
    std::array<char, 500> text{};
    (void)KVX_SIMULATED(kvxsim_conviction)(i, text.data(), text.size());
    std::fprintf(stderr, "convicted: %s\n", text.data());
  }
  return count;
}

// Everything that lives in the driver, by what it is.
inline int64_t live_objects() {
  int64_t total = 0;
  for (const char* name :
       {"live_allocations", "live_registrations", "live_streams", "live_events"}) {
    const int64_t count = simulated_count(name);
    if (count != 0) std::fprintf(stderr, "%s: %lld\n", name, static_cast<long long>(count));
    total += count;
  }
  return total;
}

// Runs a test on a fresh simulation. Nothing may be left over, and nothing done wrong.
inline void on_simulation(const char* name, const std::function<void()>& test) {
  std::fprintf(stderr, "%s\n", name);
  KVX_SIMULATED(kvxsim_reset)();
  test();
  CHECK(convictions() == 0);
  CHECK(live_objects() == 0);
}
#define RUN_ON_SIMULATION(name) ::kvx::test::on_simulation(#name, name)

inline std::shared_ptr<CudaDevice> open_simulated(int ordinal = 0) {
  std::shared_ptr<Device> device;
  CHECK_OK(open_cuda_device({.library = kSimulation, .ordinal = ordinal}, &device));
  return std::dynamic_pointer_cast<CudaDevice>(device);
}

}  // namespace kvx::test
