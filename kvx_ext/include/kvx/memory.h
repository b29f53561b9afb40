// Host memory regions: page-aligned, huge pages asked for, NUMA-local, prefaulted in parallel.
//
// A region is mapped whole at creation but its pages arrive on first touch, which is many times
// slower than a copy; prefault() takes that cost once, on several threads, with progress.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "kvx/status.h"

namespace kvx {

inline constexpr int64_t kAlignment = 4096;

enum class RegionKind : uint8_t {
  kAnonymous,  // private to this process
  kMemfd,      // has a file descriptor that another process can map
};

class HostRegion {
 public:
  // Maps `bytes`, rounded up to kAlignment, on `numa_node` (-1: wherever the kernel likes).
  static Status create(int64_t bytes, RegionKind kind, int numa_node,
                       std::unique_ptr<HostRegion>* region);
  ~HostRegion();
  HostRegion(const HostRegion&) = delete;
  HostRegion& operator=(const HostRegion&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  int fd() const { return fd_; }  // -1 unless kMemfd

  // Populates all pages on `threads` threads; returns early, kCancelled, once `stop` is set.
  // prefaulted_bytes() grows meanwhile and may be read from any thread.
  Status prefault(int threads, const std::atomic<bool>* stop);
  int64_t prefaulted_bytes() const { return prefaulted_.load(std::memory_order_relaxed); }

 private:
  HostRegion() = default;

  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
  int fd_ = -1;
  std::atomic<int64_t> prefaulted_{0};
};

// Number of NUMA nodes the kernel reports; 1 where it reports none.
[[nodiscard]] int numa_node_count();

}  // namespace kvx
