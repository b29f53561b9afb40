#include "device/emulated_device.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "device/emulated_copies.h"
#include "kvx/memory.h"

namespace kvx {

namespace {

class EmulatedMemory final : public DeviceMemory {
 public:
  EmulatedMemory(std::shared_ptr<EmulatedDevice> device, std::unique_ptr<HostRegion> region,
                 int64_t bytes, bool is_exportable)
      : device_(std::move(device)),
        region_(std::move(region)),
        data_(region_->data()),
        bytes_(is_exportable ? region_->bytes() : bytes),
        taken_bytes_(bytes),
        is_exportable_(is_exportable) {
    device_->admit(address(), bytes_);
  }
  // A mapping of what another process made; takes nothing of this device.
  EmulatedMemory(std::shared_ptr<EmulatedDevice> device, uint8_t* data, int64_t bytes)
      : device_(std::move(device)), data_(data), bytes_(bytes), is_exportable_(true) {
    device_->admit(address(), bytes_);
  }
  ~EmulatedMemory() override {
    device_->dismiss(address(), taken_bytes_);
    if (region_ == nullptr) munmap(data_, static_cast<size_t>(bytes_));
  }

  uint64_t address() const override { return reinterpret_cast<uint64_t>(data_); }
  int64_t bytes() const override { return bytes_; }
  bool is_exportable() const override { return is_exportable_; }
  int ordinal() const override { return -1; }
  const Device* device() const { return device_.get(); }
  int fd() const { return region_ == nullptr ? -1 : region_->fd(); }

 private:
  const std::shared_ptr<EmulatedDevice> device_;
  const std::unique_ptr<HostRegion> region_;
  uint8_t* const data_;
  const int64_t bytes_;
  const int64_t taken_bytes_ = 0;
  const bool is_exportable_;
};

class EmulatedPinnedRange final : public PinnedRange {
 public:
  EmulatedPinnedRange(uint8_t* base, int64_t bytes) : base_(base), bytes_(bytes) {}
  uint8_t* base() const override { return base_; }
  int64_t bytes() const override { return bytes_; }
  int64_t pinned_bytes() const override { return bytes_; }
  Status wait(double, bool* is_done) override {
    *is_done = true;
    return Status::Ok();
  }

 private:
  uint8_t* const base_;
  const int64_t bytes_;
};

// Work in an emulated stream is done before it is enqueued, so every mark has passed.
class EmulatedMark final : public StreamMark {
 public:
  Status is_reached(bool* is_reached) override {
    *is_reached = true;
    return Status::Ok();
  }
};

class EmulatedGate final : public Gate {
 public:
  void advance(uint32_t value) override {
    uint32_t seen = value_.load(std::memory_order_relaxed);
    while (seen < value && !value_.compare_exchange_weak(seen, value, std::memory_order_release)) {
    }
  }
  uint32_t value() const override { return value_.load(std::memory_order_acquire); }
  Status wait_on(uint64_t, uint32_t) override {
    return {Code::kUnavailable, "emulated streams cannot wait: wait on the CPU"};
  }

 private:
  std::atomic<uint32_t> value_{0};
};

}  // namespace

EmulatedDevice::EmulatedDevice(int64_t total_bytes) {
  info_.name = "emulated";
  info_.uuid = std::string(32, '0');
  info_.total_bytes = total_bytes;
  info_.has_exportable_memory = true;
  info_.is_emulated = true;
  info_.kernels = "none: the device is emulated";
}

Status EmulatedDevice::memory_bytes(int64_t* free_bytes, int64_t* total_bytes) {
  std::lock_guard lock(mutex_);
  *free_bytes = info_.total_bytes - used_bytes_;
  *total_bytes = info_.total_bytes;
  return Status::Ok();
}

Status EmulatedDevice::allocate(int64_t bytes, bool is_exportable,
                                std::unique_ptr<DeviceMemory>* memory) {
  if (bytes <= 0) return {Code::kUsage, "device memory needs bytes > 0"};
  {
    std::lock_guard lock(mutex_);
    if (bytes > info_.total_bytes - used_bytes_) {
      return {Code::kCapacity, "the emulated device has " +
                                   std::to_string(info_.total_bytes - used_bytes_) + " of " +
                                   std::to_string(info_.total_bytes) + " bytes free, not " +
                                   std::to_string(bytes)};
    }
    used_bytes_ += bytes;
  }
  std::unique_ptr<HostRegion> region;
  // All of it can be shared, as all memory of a GPU can, in one way or the other.
  Status status = HostRegion::create(bytes, RegionKind::kMemfd, -1, &region);
  if (!status.ok()) {
    std::lock_guard lock(mutex_);
    used_bytes_ -= bytes;
    return status;
  }
  *memory =
      std::make_unique<EmulatedMemory>(shared_from_this(), std::move(region), bytes, is_exportable);
  return Status::Ok();
}

void EmulatedDevice::admit(uint64_t address, int64_t bytes) {
  std::lock_guard lock(mutex_);
  lengths_[address] = bytes;
}

void EmulatedDevice::dismiss(uint64_t address, int64_t taken_bytes) noexcept {
  std::lock_guard lock(mutex_);
  lengths_.erase(address);
  used_bytes_ -= taken_bytes;
}

Status EmulatedDevice::pin(uint8_t* base, int64_t bytes, std::unique_ptr<PinnedRange>* range) {
  if (base == nullptr || bytes <= 0 || reinterpret_cast<uint64_t>(base) % kAlignment != 0) {
    return {Code::kUsage, "pinned memory begins at a multiple of " + std::to_string(kAlignment) +
                              " and has bytes > 0"};
  }
  *range = std::make_unique<EmulatedPinnedRange>(base, bytes);
  return Status::Ok();
}

Status EmulatedDevice::make_copies(const CopyOptions&, CopySink sink,
                                   std::unique_ptr<CopyBackend>* copies) {
  return make_emulated_copies(shared_from_this(), std::move(sink), copies);
}

Status EmulatedDevice::check_stream(uint64_t stream) {
  std::lock_guard lock(mutex_);
  if (streams_.contains(stream)) return Status::Ok();
  return {Code::kUsage, "the emulated device made no stream " + std::to_string(stream)};
}

Status EmulatedDevice::mark(uint64_t stream, std::shared_ptr<StreamMark>* mark) {
  if (Status status = check_stream(stream); !status.ok()) return status;
  *mark = std::make_shared<EmulatedMark>();
  return Status::Ok();
}

Status EmulatedDevice::make_gate(std::shared_ptr<Gate>* gate) {
  *gate = std::make_shared<EmulatedGate>();
  return Status::Ok();
}

Status EmulatedDevice::check_address(uint64_t address, int64_t* bytes) {
  std::lock_guard lock(mutex_);
  auto after = lengths_.upper_bound(address);
  if (after != lengths_.begin()) {
    const auto& [start, length] = *--after;
    const uint64_t end = start + static_cast<uint64_t>(length);
    if (address < end) {
      *bytes = static_cast<int64_t>(end - address);
      return Status::Ok();
    }
  }
  return {Code::kUsage, "address " + std::to_string(address) + " is not device memory"};
}

Status EmulatedDevice::share(const DeviceMemory& memory, SharedMemoryHandle* handle) {
  const auto* own = dynamic_cast<const EmulatedMemory*>(&memory);
  if (own == nullptr || own->device() != this || own->fd() < 0) {
    return {Code::kUsage, "this memory was not allocated by this device"};
  }
  const int fd = fcntl(own->fd(), F_DUPFD_CLOEXEC, 0);
  if (fd < 0) {
    const int error = errno;
    return {Code::kUnavailable, std::string("fcntl: ") + std::strerror(error), error};
  }
  *handle = {{}, fd, own->bytes()};
  return Status::Ok();
}

Status EmulatedDevice::share_at(uint64_t, int64_t, SharedMemoryHandle*, int64_t*) {
  return {Code::kUnavailable, "emulated memory is shared by who allocated it"};
}

Status EmulatedDevice::can_reach(int ordinal) {
  if (ordinal == -1) return Status::Ok();
  return {Code::kUnavailable, "an emulated device reaches emulated memory only"};
}

Status EmulatedDevice::open_shared(const SharedMemoryHandle& handle,
                                   std::unique_ptr<DeviceMemory>* memory) {
  struct stat found{};
  if (handle.fd < 0 || handle.size_bytes <= 0 || fstat(handle.fd, &found) != 0 ||
      found.st_size < handle.size_bytes) {
    return {Code::kUsage, "emulated memory is shared by a descriptor of at least size_bytes"};
  }
  void* data = mmap(nullptr, static_cast<size_t>(handle.size_bytes), PROT_READ | PROT_WRITE,
                    MAP_SHARED, handle.fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    return {Code::kUnavailable, std::string("mmap: ") + std::strerror(error), error};
  }
  *memory = std::make_unique<EmulatedMemory>(shared_from_this(), static_cast<uint8_t*>(data),
                                             handle.size_bytes);
  return Status::Ok();
}

Status EmulatedDevice::enable_peer(Device& peer) {
  if (peer.info().is_emulated) return Status::Ok();
  return {Code::kUnavailable, "an emulated device has emulated peers only"};
}

Status EmulatedDevice::create_stream(uint64_t* stream) {
  std::lock_guard lock(mutex_);
  *stream = ++last_stream_;
  streams_.insert(*stream);
  return Status::Ok();
}

Status EmulatedDevice::destroy_stream(uint64_t stream) {
  if (Status status = check_stream(stream); !status.ok()) return status;
  std::lock_guard lock(mutex_);
  streams_.erase(stream);
  return Status::Ok();
}

Status EmulatedDevice::synchronize_stream(uint64_t stream) { return check_stream(stream); }

Status EmulatedDevice::fill(uint64_t address, uint8_t value, int64_t bytes, uint64_t stream) {
  if (Status status = check_stream(stream); !status.ok()) return status;
  int64_t available = 0;
  if (Status status = check_address(address, &available); !status.ok()) return status;
  if (bytes < 0 || bytes > available) {
    return {Code::kUsage, "there are " + std::to_string(available) +
                              " bytes at this address, not " + std::to_string(bytes)};
  }
  std::memset(reinterpret_cast<void*>(address), value, static_cast<size_t>(bytes));
  return Status::Ok();
}

Status open_emulated_device(int64_t total_bytes, std::shared_ptr<Device>* device) {
  if (total_bytes <= 0) return {Code::kUsage, "a device needs total_bytes > 0"};
  *device = std::make_shared<EmulatedDevice>(total_bytes);
  return Status::Ok();
}

}  // namespace kvx
