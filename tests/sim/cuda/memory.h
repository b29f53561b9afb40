// Device memory and registered host memory. Device memory is a memfd mapped read-write at an alias
// that only the simulation knows; the device address lies in an arena without access rights, so the
// host faults when it dereferences one. All guarded by Simulation::mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "devices.h"
#include "shim/cuda/abi.h"

namespace kvx::sim {

inline constexpr size_t kGranularityBytes = size_t{2} << 20;
inline constexpr size_t kAllocationAlignment = 4096;

// The bytes of one allocation.
struct Backing {
  Backing(int fd, size_t bytes, Device& device, bool is_own);
  ~Backing();
  Backing(const Backing&) = delete;
  Backing& operator=(const Backing&) = delete;

  int fd;
  size_t bytes;
  Device& device;
  bool is_own;  // occupies memory of this process's device; not so what was imported
  bool is_exportable = false;
};

// A new memfd of so many bytes, charged to the device; null when the device has no more.
std::shared_ptr<Backing> create_backing(Device& device, size_t bytes, size_t total_bytes);

struct Mapping {
  std::shared_ptr<Backing> backing;
  size_t bytes = 0;
  uint32_t access = 0;  // one bit a device
};

enum class ReservationKind { kAllocated, kImported, kVirtual };

// A range of device addresses; allocations have one mapping, virtual ranges any number.
struct Reservation {
  Reservation(uint64_t address, size_t bytes, Device& device, ReservationKind kind);
  ~Reservation();
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  // Maps the backing at this offset of the alias; false when the system refuses.
  [[nodiscard]] bool map(size_t offset, std::shared_ptr<Backing> backing, uint32_t access);
  void unmap(size_t offset);
  [[nodiscard]] bool is_mapped(size_t offset, size_t size) const;
  [[nodiscard]] bool is_accessible(size_t offset, size_t size, int device_ordinal) const;
  // The mapping that the offset lies in, with its start; end() for none.
  [[nodiscard]] std::map<size_t, Mapping>::iterator find(size_t offset);

  uint64_t address;
  size_t bytes;
  Device& device;
  ReservationKind kind;
  uint8_t* alias;
  std::map<size_t, Mapping> mappings;
  // For imported memory: which, and how often it was opened.
  uint64_t imported_from = 0;
  int times_opened = 0;

 private:
  [[nodiscard]] bool holds(size_t offset, size_t size, uint32_t access) const;
};

struct Registration {
  uint64_t address = 0;
  size_t bytes = 0;
};

class Memory {
 public:
  Memory();
  void reset();

  // Whether only a device can mean this address, allocated or not.
  [[nodiscard]] bool is_device_address(uint64_t address) const;
  // The reservation that the address lies in; null for none.
  [[nodiscard]] std::shared_ptr<Reservation> find(uint64_t address) const;
  // Null when the arena or the system has no room. `bytes` is rounded up to the alignment.
  std::shared_ptr<Reservation> reserve(size_t bytes, size_t alignment, Device& device,
                                       ReservationKind kind);
  void remove(const Reservation& reservation);

  [[nodiscard]] const Registration* registration_at(uint64_t address) const;
  // Any registration that has bytes in the range; null for none.
  [[nodiscard]] const Registration* registration_in(uint64_t address, size_t bytes) const;
  void add(Registration registration) { registrations_[registration.address] = registration; }
  void remove_registration(uint64_t address) { registrations_.erase(address); }

  [[nodiscard]] uint64_t live_allocations() const { return reservations_.size() + handles.size(); }
  [[nodiscard]] uint64_t live_registrations() const { return registrations_.size(); }
  [[nodiscard]] const std::map<uint64_t, std::shared_ptr<Reservation>>& reservations() const {
    return reservations_;
  }

  // cuMemCreate's handles; a mapping keeps its memory when the handle is gone.
  std::map<cuda::AllocationHandle, std::shared_ptr<Backing>> handles;
  uint64_t next_handle = 1;

 private:
  uint64_t find_gap(uint64_t from, size_t bytes, size_t alignment) const;

  uint64_t arena_ = 0;
  uint64_t cursor_ = 0;  // where the search begins: addresses come back as late as possible
  std::map<uint64_t, std::shared_ptr<Reservation>> reservations_;
  std::map<uint64_t, Registration> registrations_;
};

// Whether all of the host range is mapped, so that reading it does not end the process.
bool is_host_memory(uint64_t address, size_t bytes);

}  // namespace kvx::sim
