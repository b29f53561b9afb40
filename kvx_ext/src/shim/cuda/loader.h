// Finds the CUDA driver of this machine and its entry points. Nothing of CUDA is linked.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "kvx/status.h"
#include "shim/cuda/abi.h"

namespace kvx::cuda {

// Exported by the simulated driver only: who reads and writes the host memory that copies use.
inline constexpr const char* kHostAccessSymbol = "kvxsim_host_access";
using HostAccess = void (*)(const void* address, size_t bytes, int is_write);

// The oldest driver with all required entry points under one name each.
inline constexpr int kOldestDriver = 12000;

struct Driver {
  Api api;
  int version = 0;       // 13000 is 13.0
  int device_count = 0;  // at least 1
  HostAccess host_access = nullptr;
};

// Loads `library` and calls cuInit. The library stays loaded for good: the driver has threads.
// kUnavailable says what is missing and what to do about it.
Status load_driver(const std::string& library, std::shared_ptr<const Driver>* driver);

// "cuMemAlloc of 4096 bytes: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory". The code is kCapacity
// for that, kUnavailable where the device or driver cannot, else kDevice.
Status failure(const Api& api, std::string_view what, Result result);

}  // namespace kvx::cuda
