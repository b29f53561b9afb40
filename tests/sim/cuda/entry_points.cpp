#include "entry_points.h"

#include <cstring>
#include <string_view>

#include "simulation.h"

namespace kvx::sim {

namespace {

struct EntryPoint {
  std::string_view symbol;
  int since_version;
  void* function;
};

constexpr int kSymbolFound = 0;
constexpr int kSymbolNotFound = 1;
constexpr int kVersionNotSufficient = 2;

// The version of the interface in which the form that kvx declares appeared.
constexpr int since_version(std::string_view symbol) {
  if (symbol == "cuMemcpyBatchAsync") return 12080;
  if (symbol == "cuStreamWaitValue32" || symbol == "cuStreamWriteValue32") return 11070;
  if (symbol == "cuDevicePrimaryCtxRelease") return 11000;
  if (symbol == "cuDeviceGetUuid") return 11040;
  if (symbol == "cuMemCreate" || symbol == "cuMemMap" || symbol == "cuMemSetAccess") return 10020;
  return 4000;
}

template <typename Function>
void* untyped(Function* function) {
  return reinterpret_cast<void*>(function);
}

const EntryPoint kEntryPoints[] = {
#define KVX_SIM_ROW(member, symbol, parameters) {#symbol, since_version(#symbol), untyped(&symbol)},
    KVX_CUDA_REQUIRED(KVX_SIM_ROW) KVX_CUDA_OPTIONAL(KVX_SIM_ROW)
#undef KVX_SIM_ROW
        {"cuMemcpyBatchAsync", 13000, untyped(&cuMemcpyBatchAsync_v2)},
};

bool is_hidden(const Simulation& sim, std::string_view symbol) {
  if (symbol == "cuMemcpyBatchAsync") return !sim.has_batch_copy;
  const bool is_stream_value = symbol == "cuStreamWaitValue32" || symbol == "cuStreamWriteValue32";
  return is_stream_value && !sim.has_stream_values;
}

}  // namespace

extern "C" Result cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                      uint64_t /*flags*/, int* symbol_status) {
  if (symbol == nullptr || function == nullptr) return kErrorInvalidValue;
  Simulation& sim = simulation();
  std::lock_guard lock(sim.mutex);
  *function = nullptr;
  int status = kSymbolNotFound;
  for (const EntryPoint& entry : kEntryPoints) {
    const bool is_known = entry.symbol == symbol && entry.since_version <= sim.driver_version;
    if (!is_known || is_hidden(sim, entry.symbol)) continue;
    if (entry.since_version > version) {
      if (status != kSymbolFound) status = kVersionNotSufficient;
      continue;
    }
    *function = entry.function;  // later rows are newer forms
    status = kSymbolFound;
  }
  if (symbol_status != nullptr) *symbol_status = status;
  return status == kSymbolFound || symbol_status != nullptr ? kSuccess : kErrorNotFound;
}

}  // namespace kvx::sim
