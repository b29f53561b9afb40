#include "memory.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <vector>

namespace kvx::sim {

namespace {

// Room for every allocation of a long test run without an address coming back; ThreadSanitizer
// leaves little more than 1 TiB to mappings.
constexpr size_t kArenaBytes = size_t{512} << 30;
// Between neighbours, so that running out of one never runs into another.
constexpr size_t kGapBytes = size_t{64} << 10;

uint64_t round_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

uint8_t* map_inaccessible(size_t bytes) {
  // The system call itself: sanitizers would map shadow memory for all of it.
  const long address = syscall(SYS_mmap, nullptr, bytes, PROT_NONE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0L);
  return address == -1 ? nullptr : reinterpret_cast<uint8_t*>(address);
}

}  // namespace

Backing::Backing(int fd_, size_t bytes_, Device& device_, bool is_own_)
    : fd(fd_), bytes(bytes_), device(device_), is_own(is_own_) {
  if (is_own) device.used_bytes += bytes;
}

Backing::~Backing() {
  close(fd);
  if (is_own) device.used_bytes -= bytes;
}

std::shared_ptr<Backing> create_backing(Device& device, size_t bytes, size_t total_bytes) {
  if (bytes > total_bytes - std::min(total_bytes, device.used_bytes)) return nullptr;
  const int fd = memfd_create("kvx-simulated-device-memory", MFD_CLOEXEC);
  if (fd < 0) return nullptr;
  if (ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    close(fd);
    return nullptr;
  }
  return std::make_shared<Backing>(fd, bytes, device, true);
}

Reservation::Reservation(uint64_t address_, size_t bytes_, Device& device_, ReservationKind kind_)
    : address(address_),
      bytes(bytes_),
      device(device_),
      kind(kind_),
      alias(map_inaccessible(bytes_)) {}

Reservation::~Reservation() {
  if (alias != nullptr) munmap(alias, bytes);
}

bool Reservation::map(size_t offset, std::shared_ptr<Backing> backing, uint32_t access) {
  const size_t size = backing->bytes;
  void* mapped =
      mmap(alias + offset, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, backing->fd, 0);
  if (mapped == MAP_FAILED) return false;
  mappings[offset] = Mapping{std::move(backing), size, access};
  return true;
}

void Reservation::unmap(size_t offset) {
  const auto found = mappings.find(offset);
  void* mapped = mmap(alias + offset, found->second.bytes, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  if (mapped == MAP_FAILED) std::perror("simulated driver: cannot unmap");
  mappings.erase(found);
}

std::map<size_t, Mapping>::iterator Reservation::find(size_t offset) {
  auto after = mappings.upper_bound(offset);
  if (after == mappings.begin()) return mappings.end();
  --after;
  return offset - after->first < after->second.bytes ? after : mappings.end();
}

bool Reservation::holds(size_t offset, size_t size, uint32_t access) const {
  if (size > bytes || offset > bytes - size) return false;
  auto at = mappings.upper_bound(offset);
  if (at == mappings.begin()) return false;
  --at;
  size_t reached = offset;
  while (at != mappings.end() && at->first <= reached && (at->second.access & access) == access) {
    const size_t end = at->first + at->second.bytes;
    if (end <= reached) return false;
    if (end >= offset + size) return true;
    reached = end;
    ++at;
  }
  return false;
}

bool Reservation::is_mapped(size_t offset, size_t size) const { return holds(offset, size, 0); }

bool Reservation::is_accessible(size_t offset, size_t size, int device_ordinal) const {
  return holds(offset, size, 1u << device_ordinal);
}

Memory::Memory() {
  arena_ = reinterpret_cast<uint64_t>(map_inaccessible(kArenaBytes));
  if (arena_ == 0) {
    std::perror("simulated driver: no address space for device memory");
    std::abort();
  }
  cursor_ = arena_;
}

void Memory::reset() {
  handles.clear();
  reservations_.clear();
  registrations_.clear();
}

bool Memory::is_device_address(uint64_t address) const {
  return address >= arena_ && address - arena_ < kArenaBytes;
}

std::shared_ptr<Reservation> Memory::find(uint64_t address) const {
  auto after = reservations_.upper_bound(address);
  if (after == reservations_.begin()) return nullptr;
  const auto& reservation = std::prev(after)->second;
  return address - reservation->address < reservation->bytes ? reservation : nullptr;
}

// Zero when there is none before the end of the arena.
uint64_t Memory::find_gap(uint64_t from, size_t bytes, size_t alignment) const {
  uint64_t candidate = round_up(from, alignment);
  auto next = reservations_.lower_bound(candidate);
  if (next != reservations_.begin()) {
    const auto& before = *std::prev(next)->second;
    candidate = std::max(candidate, round_up(before.address + before.bytes + kGapBytes, alignment));
  }
  while (next != reservations_.end() && next->first < candidate + bytes + kGapBytes) {
    candidate = round_up(next->first + next->second->bytes + kGapBytes, alignment);
    ++next;
  }
  return candidate + bytes + kGapBytes <= arena_ + kArenaBytes ? candidate : 0;
}

std::shared_ptr<Reservation> Memory::reserve(size_t bytes, size_t alignment, Device& device,
                                             ReservationKind kind) {
  if (bytes == 0 || bytes > kArenaBytes) return nullptr;
  bytes = round_up(bytes, kAllocationAlignment);
  uint64_t address = find_gap(cursor_, bytes, alignment);
  if (address == 0) address = find_gap(arena_, bytes, alignment);
  if (address == 0) return nullptr;
  auto reservation = std::make_shared<Reservation>(address, bytes, device, kind);
  if (reservation->alias == nullptr) return nullptr;
  cursor_ = address + bytes + kGapBytes;
  reservations_[address] = reservation;
  return reservation;
}

void Memory::remove(const Reservation& reservation) { reservations_.erase(reservation.address); }

const Registration* Memory::registration_at(uint64_t address) const {
  return registration_in(address, 1);
}

const Registration* Memory::registration_in(uint64_t address, size_t bytes) const {
  auto after = registrations_.lower_bound(address + bytes);
  if (after == registrations_.begin()) return nullptr;
  const Registration& last = std::prev(after)->second;
  return last.address + last.bytes > address ? &last : nullptr;
}

bool is_host_memory(uint64_t address, size_t bytes) {
  const auto page_bytes = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  const uint64_t first = address / page_bytes * page_bytes;
  const size_t size = round_up(address + bytes, page_bytes) - first;
  std::vector<unsigned char> residence(size / page_bytes);
  return mincore(reinterpret_cast<void*>(first), size, residence.data()) == 0;
}

}  // namespace kvx::sim
