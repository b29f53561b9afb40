#include "kvx/exposed_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "clock.h"

namespace kvx {

namespace {

// Nobody can shrink it under a copy, which would end in SIGBUS, and nobody who maps it from now on
// can write it. Mappings that exist, which is the owner's, keep what they may do.
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE;

Status seal(int fd) {
  if (fcntl(fd, F_ADD_SEALS, kSeals) == 0) return Status::Ok();
  const int error = errno;
  // Refused where all seals are in place already and sealed themselves.
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals >= 0 && (seals & kSeals) == kSeals) return Status::Ok();
  return {Code::kUnavailable,
          std::string("this descriptor cannot be sealed against writes by peers: ") +
              std::strerror(error) +
              "; only a memfd made with MFD_ALLOW_SEALING can, as that of a shared MemoryRegion; "
              "register the memory without its descriptor instead",
          error};
}

Status check_extent(int fd, int64_t bytes, int64_t fd_offset) {
  struct stat facts{};
  if (fstat(fd, &facts) != 0) {
    return {Code::kUsage, std::string("this descriptor is none: ") + std::strerror(errno), errno};
  }
  if (fd_offset < 0 || fd_offset > facts.st_size || bytes > facts.st_size - fd_offset) {
    return {Code::kUsage, std::to_string(bytes) + " bytes from offset " +
                              std::to_string(fd_offset) + " do not lie within a memfd of " +
                              std::to_string(facts.st_size)};
  }
  return Status::Ok();
}

}  // namespace

RegionHold& RegionHold::operator=(RegionHold&& other) noexcept {
  if (this != &other) {
    release();
    region_ = std::move(other.region_);
  }
  return *this;
}

RegionHold RegionHold::again() const {
  if (region_ == nullptr) return {};
  std::lock_guard lock(region_->mutex_);
  ++region_->holds_;
  return RegionHold(region_);
}

void RegionHold::release() {
  if (region_ == nullptr) return;
  {
    std::lock_guard lock(region_->mutex_);
    if (--region_->holds_ == 0) region_->idle_.notify_all();
  }
  region_.reset();
}

Status RegionTable::add(uint8_t* base, int64_t bytes, int fd, int64_t fd_offset, uint32_t* id) {
  if (base == nullptr || bytes <= 0) {
    return {Code::kUsage, "a region needs an address and bytes > 0, not " + std::to_string(bytes)};
  }
  if (fd >= 0) {
    if (Status status = check_extent(fd, bytes, fd_offset); !status.ok()) return status;
    if (Status status = seal(fd); !status.ok()) return status;
  }
  std::lock_guard lock(mutex_);
  *id = free_number(1, kOpaqueRegions, &next_id_);
  regions_.emplace(*id, std::make_shared<ExposedRegion>(*id, base, bytes, fd, fd_offset));
  return Status::Ok();
}

Status RegionTable::add_opaque(int64_t bytes, uint32_t* id) {
  if (bytes <= 0) return {Code::kUsage, "a region needs bytes > 0, not " + std::to_string(bytes)};
  std::lock_guard lock(mutex_);
  *id = free_number(kOpaqueRegions, UINT32_MAX, &next_opaque_id_);
  regions_.emplace(*id, std::make_shared<ExposedRegion>(*id, nullptr, bytes, -1, 0));
  return Status::Ok();
}

uint32_t RegionTable::free_number(uint32_t first, uint32_t end, uint32_t* next) const {
  // One that lives keeps its number even after two thousand million others.
  while (*next < first || *next >= end || regions_.contains(*next)) {
    *next = *next < first || *next >= end ? first : *next + 1;
  }
  return (*next)++;
}

RegionHold RegionTable::hold(uint32_t id) {
  std::lock_guard lock(mutex_);
  const auto found = regions_.find(id);
  if (found == regions_.end()) return {};
  ExposedRegion& region = *found->second;
  std::lock_guard region_lock(region.mutex_);
  if (region.is_closing_) return {};
  ++region.holds_;
  return RegionHold(found->second);
}

Status RegionTable::remove(uint32_t id, double timeout_s) {
  std::shared_ptr<ExposedRegion> region;
  {
    std::lock_guard lock(mutex_);
    const auto found = regions_.find(id);
    if (found == regions_.end()) {
      return {Code::kUsage, "no region has the number " + std::to_string(id)};
    }
    region = found->second;
  }
  {
    std::unique_lock lock(region->mutex_);
    region->is_closing_ = true;
    if (!region->idle_.wait_until(lock, time_after(timeout_s),
                                  [&region] { return region->holds_ == 0; })) {
      return {Code::kTimeout, "region " + std::to_string(id) + " is still in use by " +
                                  std::to_string(region->holds_) +
                                  " leases or transfers; keep its memory and try again"};
    }
  }
  std::lock_guard lock(mutex_);
  // Another caller may have removed it meanwhile, and its number may belong to a new one.
  const auto found = regions_.find(id);
  if (found != regions_.end() && found->second == region) regions_.erase(found);
  return Status::Ok();
}

std::vector<std::shared_ptr<const ExposedRegion>> RegionTable::all() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<const ExposedRegion>> regions;
  for (const auto& [id, region] : regions_) {
    std::lock_guard region_lock(region->mutex_);
    if (!region->is_closing_) regions.push_back(region);
  }
  std::ranges::sort(regions, {}, [](const auto& region) { return region->id(); });
  return regions;
}

int64_t RegionTable::bytes() const {
  std::lock_guard lock(mutex_);
  int64_t total = 0;
  for (const auto& [id, region] : regions_) total += region->bytes();
  return total;
}

}  // namespace kvx
