// Device memory, by where it came from: cuMemAlloc, a mapping of our own, another process.
#pragma once

#include <memory>
#include <vector>

#include "device/cuda_device.h"

namespace kvx {

// One cuMemAlloc. Shared with other processes by IPC handle.
class PlainMemory final : public DeviceMemory {
 public:
  static Status create(std::shared_ptr<CudaDevice> device, int64_t bytes,
                       std::unique_ptr<DeviceMemory>* memory);
  ~PlainMemory() override;

  uint64_t address() const override { return address_; }
  int64_t bytes() const override { return bytes_; }
  bool is_exportable() const override { return false; }
  int ordinal() const override { return device_->context().device(); }
  const CudaDevice& device() const { return *device_; }

 private:
  PlainMemory(std::shared_ptr<CudaDevice> device, uint64_t address, int64_t bytes)
      : device_(std::move(device)), address_(address), bytes_(bytes) {}

  const std::shared_ptr<CudaDevice> device_;
  const uint64_t address_;
  const int64_t bytes_;
};

// An allocation mapped into a range of its own; has file descriptors to share. Made or imported.
class MappedMemory final : public DeviceMemory {
 public:
  static Status create(std::shared_ptr<CudaDevice> device, int64_t bytes,
                       std::unique_ptr<DeviceMemory>* memory);
  static Status import(std::shared_ptr<CudaDevice> device, int fd, int64_t bytes,
                       std::unique_ptr<DeviceMemory>* memory);
  ~MappedMemory() override;
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  uint64_t address() const override { return address_; }
  int64_t bytes() const override { return bytes_; }
  bool is_exportable() const override { return true; }
  int ordinal() const override { return device_->context().device(); }
  const CudaDevice& device() const { return *device_; }

  // REQUIRES for both: the context is current.
  cuda::Result export_fd(int* fd) const;
  cuda::Result open_to(const std::vector<cuda::DeviceOrdinal>& devices);

 private:
  explicit MappedMemory(std::shared_ptr<CudaDevice> device) : device_(std::move(device)) {}
  Status map();

  const std::shared_ptr<CudaDevice> device_;
  int64_t bytes_ = 0;
  // What has been done so far; the destructor undoes it in reverse.
  cuda::AllocationHandle handle_ = 0;
  bool has_handle_ = false;
  uint64_t address_ = 0;
  bool is_mapped_ = false;
  bool is_admitted_ = false;
};

// Plain memory of another process.
class ForeignMemory final : public DeviceMemory {
 public:
  static Status open(std::shared_ptr<CudaDevice> device, const cuda::IpcMemHandle& handle,
                     int64_t offset, int64_t bytes, std::unique_ptr<DeviceMemory>* memory);
  ~ForeignMemory() override;

  uint64_t address() const override { return base_ + static_cast<uint64_t>(offset_); }
  int64_t bytes() const override { return bytes_; }
  bool is_exportable() const override { return false; }
  int ordinal() const override { return device_->context().device(); }

 private:
  ForeignMemory(std::shared_ptr<CudaDevice> device, uint64_t base, int64_t offset, int64_t bytes)
      : device_(std::move(device)), base_(base), offset_(offset), bytes_(bytes) {}

  const std::shared_ptr<CudaDevice> device_;
  const uint64_t base_;
  const int64_t offset_;
  const int64_t bytes_;
};

}  // namespace kvx
