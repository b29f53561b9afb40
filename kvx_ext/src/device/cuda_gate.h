// The words in pinned host memory that gates are, and when a word may be used again.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "device/cuda_events.h"
#include "kvx/device.h"
#include "kvx/memory.h"

namespace kvx {

class CudaDevice;

// A word that streams wait for, with the last wait of each stream. Another gate may have the word
// only when all those waits have passed, or its small values would hold them up for ever.
struct GateWord {
  uint32_t* host = nullptr;
  cuda::DevicePointer device = 0;
  std::map<cuda::Stream, PooledEvent> waits;
  bool is_untraceable = false;  // a wait without an event after it: never used again
};

// Thread-safe.
class GateWords {
 public:
  explicit GateWords(CudaContext& context) : context_(context) {}
  ~GateWords();
  GateWords(const GateWords&) = delete;
  GateWords& operator=(const GateWords&) = delete;

  // REQUIRES: the context is current. The word is 0.
  Status take(GateWord* word);
  void give_back(GateWord word) noexcept;

 private:
  static constexpr int64_t kBlockBytes = 65536;
  static constexpr int64_t kWordBytes = 64;  // a cache line each: CPUs and devices poll them

  Status add_block();
  void collect();  // words whose waits have passed become idle

  CudaContext& context_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<HostRegion>> blocks_;  // mutex_
  std::vector<GateWord> idle_;                       // mutex_
  std::vector<GateWord> awaited_;                    // mutex_
};

}  // namespace kvx
