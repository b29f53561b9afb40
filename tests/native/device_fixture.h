// What the tests of devices share: copies whose completions can be waited for, and host memory.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "kvx/device.h"
#include "kvx/memory.h"

namespace kvx::test {

#define CHECK_OK(expression)                                                    \
  do {                                                                          \
    const ::kvx::Status checked = (expression);                                 \
    if (!checked.ok()) std::fprintf(stderr, "%s\n", checked.message().c_str()); \
    CHECK(checked.ok());                                                        \
  } while (false)

// Completions by token. A token is waited for once; a second completion of it is a defect.
class Completions {
 public:
  CopySink sink() {
    return [state = state_](std::span<const CopyCompletion> completions) {
      std::lock_guard lock(state->mutex);
      for (const CopyCompletion& completion : completions) {
        CHECK(state->arrived.emplace(completion.token, completion).second);
      }
      state->news.notify_all();
    };
  }

  CopyCompletion wait(uint64_t token) {
    std::unique_lock lock(state_->mutex);
    CHECK(state_->news.wait_for(lock, std::chrono::seconds(30),
                                [&] { return state_->arrived.contains(token); }));
    return state_->arrived[token];
  }

  bool has(uint64_t token) {
    std::lock_guard lock(state_->mutex);
    return state_->arrived.contains(token);
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable news;
    std::map<uint64_t, CopyCompletion> arrived;  // mutex
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

inline std::unique_ptr<HostRegion> host_memory(int64_t bytes) {
  std::unique_ptr<HostRegion> region;
  CHECK_OK(HostRegion::create(bytes, RegionKind::kAnonymous, -1, &region));
  return region;
}

inline std::unique_ptr<DeviceMemory> device_memory(Device& device, int64_t bytes,
                                                   bool is_exportable = false) {
  std::unique_ptr<DeviceMemory> memory;
  CHECK_OK(device.allocate(bytes, is_exportable, &memory));
  return memory;
}

inline uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

inline CopyRequest one_run(CopyDirection direction, uint64_t target, uint64_t source, size_t bytes,
                           uint64_t token) {
  CopyRequest request;
  request.direction = direction;
  request.runs.add(target, source, bytes);
  request.token = token;
  return request;
}

}  // namespace kvx::test
