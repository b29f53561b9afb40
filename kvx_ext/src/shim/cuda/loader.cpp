#include "shim/cuda/loader.h"

#include <dlfcn.h>

#include <algorithm>
#include <utility>

namespace kvx::cuda {

namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

Status stub_library(const std::string& library) {
  return {Code::kUnavailable,
          library +
              " is the stub of the CUDA toolkit, not a driver: take its `stubs` folder out of "
              "LD_LIBRARY_PATH, or install the NVIDIA driver",
          kErrorStubLibrary};
}

// cuInit and the version come before an Api can be complete, so their errors have no text yet.
Status first_call_failed(const std::string& library, const char* call, Result result) {
  if (result == kErrorStubLibrary) return stub_library(library);
  if (result == kErrorNoDevice) {
    return {Code::kUnavailable,
            "the CUDA driver finds no device: check `nvidia-smi`, CUDA_VISIBLE_DEVICES and, in a "
            "container, that it was started with GPUs",
            result};
  }
  return {Code::kUnavailable,
          std::string(call) + " of " + library + " failed with error " + std::to_string(result) +
              ": check `nvidia-smi`; a driver that was updated needs its kernel module reloaded",
          result};
}

Status too_old(int version) {
  return {Code::kUnavailable, "the CUDA driver is of version " + version_text(version) +
                                  ", kvx needs " + version_text(kOldestDriver) +
                                  ": update the NVIDIA driver to 525 or newer"};
}

template <typename Entry>
Result resolve(GetProcAddress get, const char* symbol, int version, Entry* entry) {
  void* found = nullptr;
  int symbol_status = 0;
  const Result result = get(symbol, &found, version, 0, &symbol_status);
  *entry = result == kSuccess ? reinterpret_cast<Entry>(found) : nullptr;
  return result;
}

Status resolve_all(const std::string& library, GetProcAddress get, Driver* driver) {
  const int version = std::min(driver->version, kAbiVersion);
#define KVX_CUDA_RESOLVE(member, symbol, parameters)                                        \
  if (resolve(get, #symbol, version, &driver->api.member), driver->api.member == nullptr) { \
    return {Code::kUnavailable,                                                             \
            library + " has no " #symbol ": it is not a complete CUDA driver of version " + \
                version_text(version) + "; reinstall the NVIDIA driver"};                   \
  }
  KVX_CUDA_REQUIRED(KVX_CUDA_RESOLVE)
#undef KVX_CUDA_RESOLVE
#define KVX_CUDA_RESOLVE(member, symbol, parameters) \
  (void)resolve(get, #symbol, version, &driver->api.member);
  KVX_CUDA_OPTIONAL(KVX_CUDA_RESOLVE)
#undef KVX_CUDA_RESOLVE
  return Status::Ok();
}

Status find_version(const std::string& library, void* handle, GetProcAddress get, int* version) {
  // A driver before 12.0 has no cuGetProcAddress_v2, but says how old it is under the plain name.
  auto ask = reinterpret_cast<decltype(Api::driver_version)>(dlsym(handle, "cuDriverGetVersion"));
  Result result = kSuccess;
  if (ask == nullptr && get != nullptr) {
    result = resolve(get, "cuDriverGetVersion", kOldestDriver, &ask);
  }
  if (result != kSuccess) return first_call_failed(library, "cuGetProcAddress", result);
  if (ask == nullptr) {
    return {Code::kUnavailable, library + " is not a CUDA driver: it has no cuDriverGetVersion"};
  }
  result = ask(version);
  if (result != kSuccess) return first_call_failed(library, "cuDriverGetVersion", result);
  if (*version < kOldestDriver || get == nullptr) return too_old(*version);
  return Status::Ok();
}

}  // namespace

Status load_driver(const std::string& library, std::shared_ptr<const Driver>* driver) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = dlerror();
    return {Code::kUnavailable,
            "there is no CUDA driver: " + std::string(reason == nullptr ? library : reason) +
                "; install the NVIDIA driver, or start the container with GPUs"};
  }
  const auto get = reinterpret_cast<GetProcAddress>(dlsym(handle, kGetProcAddressSymbol));
  auto made = std::make_shared<Driver>();
  if (Status status = find_version(library, handle, get, &made->version); !status.ok()) {
    return status;
  }
  if (Status status = resolve_all(library, get, made.get()); !status.ok()) return status;
  if (const Result result = made->api.init(0); result != kSuccess) {
    return first_call_failed(library, "cuInit", result);
  }
  if (const Result result = made->api.device_count(&made->device_count); result != kSuccess) {
    return first_call_failed(library, "cuDeviceGetCount", result);
  }
  if (made->device_count < 1) return first_call_failed(library, "cuDeviceGetCount", kErrorNoDevice);
  made->host_access = reinterpret_cast<HostAccess>(dlsym(handle, kHostAccessSymbol));
  *driver = std::move(made);
  return Status::Ok();
}

Status failure(const Api& api, std::string_view what, Result result) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (api.error_name(result, &name) != kSuccess || name == nullptr) name = "error";
  if (api.error_string(result, &text) != kSuccess || text == nullptr) text = "no description";
  Code code = Code::kDevice;
  if (result == kErrorOutOfMemory) code = Code::kCapacity;
  if (result == kErrorNotSupported || result == kErrorNotPermitted ||
      result == kErrorPeerAccessUnsupported) {
    code = Code::kUnavailable;
  }
  return {code, std::string(what) + ": " + name + " (" + std::to_string(result) + "): " + text,
          result};
}

}  // namespace kvx::cuda
