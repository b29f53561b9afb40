#include "simulation.h"

#include <string_view>
#include <thread>

namespace kvx::sim {

namespace {

bool starts_with_any(std::string_view symbol, std::initializer_list<std::string_view> prefixes) {
  for (const std::string_view prefix : prefixes) {
    if (symbol.starts_with(prefix)) return true;
  }
  return false;
}

bool needs_init(std::string_view symbol) {
  return !starts_with_any(symbol, {"cuInit", "cuDriverGetVersion", "cuGetError"});
}

bool needs_context(std::string_view symbol) {
  return needs_init(symbol) && !starts_with_any(symbol, {"cuDevice", "cuCtxSetCurrent", "cuCtxPush",
                                                         "cuCtxGetCurrent", "cuCtxPop"});
}

}  // namespace

Simulation& simulation() {
  static auto* const simulated = new Simulation;
  return *simulated;
}

void Simulation::reset() {
  std::unique_lock lock(mutex);
  is_abandoning = true;
  streams.reset(*this, lock);
  is_abandoning = false;
  memory.reset();
  devices.reset();
  modules.reset();
  races.reset();
  faults.clear();
  convictions.clear();
  counters = {};
  driver_version = kDefaultDriverVersion;
  has_batch_copy = true;
  has_stream_values = true;
  shuffle_seed = kDefaultShuffleSeed;
}

Call::Call(const char* symbol)
    : symbol_(symbol),
      simulation_(simulation()),
      lock_(simulation_.mutex),
      device_(current_device()),
      refusal_(cuda::kSuccess) {
  const auto delay = simulation_.faults.delay_of(symbol);
  if (delay.count() > 0) {
    lock_.unlock();
    std::this_thread::sleep_for(delay);
    lock_.lock();
  }
  const Failure failure = simulation_.faults.next(symbol);
  const bool is_at_context = needs_context(symbol);
  if (failure.result != cuda::kSuccess) {
    refusal_ = failure.result;
    if (failure.is_sticky && device_ != nullptr) device_->sticky = failure.result;
    simulation_.changed.notify_all();  // who waits learns of a lost context
  } else if (needs_init(symbol) && !simulation_.is_initialized) {
    refusal_ = cuda::kErrorNotInitialized;
  } else if (is_at_context && (device_ == nullptr || device_->retained == 0)) {
    refusal_ = cuda::kErrorInvalidContext;
  } else if (is_at_context) {
    refusal_ = device_->sticky;
  }
}

Result Call::illegal_address(std::string_view kind, std::string text) {
  simulation_.convictions.add(kind, std::string(symbol_) + ": " + std::move(text));
  device_->sticky = cuda::kErrorIllegalAddress;
  simulation_.changed.notify_all();
  return cuda::kErrorIllegalAddress;
}

}  // namespace kvx::sim
