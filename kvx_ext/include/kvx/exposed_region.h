// Memory that an agent's transfers may touch, and who is using it.
//
// Memory that no CPU can touch, such as that of a device, is an opaque region: it is leased and
// held like any other, and its bytes are moved by somebody else.
//
// A region is used through holds; removing it waits for them, so memory is never freed under bytes
// that still move. A memfd that is exposed is sealed first: others can map it, never write it. Only
// the owner of memory ever writes it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "kvx/status.h"

namespace kvx {

// Opaque regions are numbered from here on, so that a peer can tell.
inline constexpr uint32_t kOpaqueRegions = 1U << 31;

class ExposedRegion {
 public:
  ExposedRegion(uint32_t id, uint8_t* base, int64_t bytes, int fd, int64_t fd_offset)
      : id_(id), base_(base), bytes_(bytes), fd_(fd), fd_offset_(fd_offset) {}

  uint32_t id() const { return id_; }
  uint8_t* base() const { return base_; }  // null: opaque
  bool is_opaque() const { return base_ == nullptr; }
  int64_t bytes() const { return bytes_; }
  int fd() const { return fd_; }  // -1: private memory; belongs to whoever registered it
  int64_t fd_offset() const { return fd_offset_; }

 private:
  friend class RegionTable;
  friend class RegionHold;

  const uint32_t id_;
  uint8_t* const base_;
  const int64_t bytes_;
  const int fd_;
  const int64_t fd_offset_;

  std::mutex mutex_;
  std::condition_variable idle_;
  int64_t holds_ = 0;        // mutex_
  bool is_closing_ = false;  // mutex_
};

// Keeps a region from being removed. Movable; empty when default-made or moved from.
class RegionHold {
 public:
  RegionHold() = default;
  RegionHold(RegionHold&& other) noexcept = default;
  RegionHold& operator=(RegionHold&& other) noexcept;
  ~RegionHold() { release(); }

  // Another hold on the same region. Works while the region is closing: this one keeps it.
  RegionHold again() const;
  void release();

  explicit operator bool() const { return region_ != nullptr; }
  const ExposedRegion* operator->() const { return region_.get(); }
  const ExposedRegion& operator*() const { return *region_; }

 private:
  friend class RegionTable;
  explicit RegionHold(std::shared_ptr<ExposedRegion> region) : region_(std::move(region)) {}

  std::shared_ptr<ExposedRegion> region_;
};

// Thread-safe.
class RegionTable {
 public:
  // `fd` is that of a memfd mapped at `base` from `fd_offset` on, or -1. Seals it against shrinking
  // and against writes by others; kUnavailable where it cannot be sealed.
  Status add(uint8_t* base, int64_t bytes, int fd, int64_t fd_offset, uint32_t* id);
  // An opaque region of so many bytes, which nobody is told of.
  Status add_opaque(int64_t bytes, uint32_t* id);
  // Empty when there is no such region, or it is being removed.
  RegionHold hold(uint32_t id);
  // Refuses new holds and waits for the others. kTimeout: it is still in use, and is refused from
  // now on all the same; call again.
  Status remove(uint32_t id, double timeout_s);

  // Those that are not being removed, in the order of their numbers.
  std::vector<std::shared_ptr<const ExposedRegion>> all() const;
  int64_t bytes() const;  // of all, until they are removed

 private:
  // REQUIRES mutex_. A number of [first, end) that no region has; `next` is where to look.
  uint32_t free_number(uint32_t first, uint32_t end, uint32_t* next) const;

  mutable std::mutex mutex_;
  std::unordered_map<uint32_t, std::shared_ptr<ExposedRegion>> regions_;  // mutex_
  uint32_t next_id_ = 1;                                                  // mutex_
  uint32_t next_opaque_id_ = kOpaqueRegions;                              // mutex_
};

}  // namespace kvx
