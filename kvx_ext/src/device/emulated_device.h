// A device in host memory, for machines without a GPU and for tests: see kvx/device.h.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "kvx/device.h"

namespace kvx {

class EmulatedDevice final : public Device, public std::enable_shared_from_this<EmulatedDevice> {
 public:
  explicit EmulatedDevice(int64_t total_bytes);

  DeviceInfo info() const override { return info_; }
  Status memory_bytes(int64_t* free_bytes, int64_t* total_bytes) override;
  Status allocate(int64_t bytes, bool is_exportable,
                  std::unique_ptr<DeviceMemory>* memory) override;
  Status pin(uint8_t* base, int64_t bytes, std::unique_ptr<PinnedRange>* range) override;
  Status make_copies(const CopyOptions& options, CopySink sink,
                     std::unique_ptr<CopyBackend>* copies) override;
  Status mark(uint64_t stream, std::shared_ptr<StreamMark>* mark) override;
  Status make_gate(std::shared_ptr<Gate>* gate) override;
  Status check_address(uint64_t address, int64_t* bytes) override;
  Status share(const DeviceMemory& memory, SharedMemoryHandle* handle) override;
  Status share_at(uint64_t address, int64_t bytes, SharedMemoryHandle* handle,
                  int64_t* offset) override;
  Status can_reach(int ordinal) override;
  Status open_shared(const SharedMemoryHandle& handle,
                     std::unique_ptr<DeviceMemory>* memory) override;
  Status enable_peer(Device& peer) override;
  Status create_stream(uint64_t* stream) override;
  Status destroy_stream(uint64_t stream) override;
  Status synchronize_stream(uint64_t stream) override;
  Status fill(uint64_t address, uint8_t value, int64_t bytes, uint64_t stream) override;
  Status health() const override { return Status::Ok(); }
  void note_host_access(const void*, int64_t, bool) override {}

  // What EmulatedMemory says of itself: where it lies, and what it takes of the device.
  void admit(uint64_t address, int64_t bytes);
  void dismiss(uint64_t address, int64_t taken_bytes) noexcept;

 private:
  Status check_stream(uint64_t stream);

  DeviceInfo info_;
  std::mutex mutex_;
  uint64_t last_stream_ = 1;             // mutex_; 1 is a name of the null stream
  int64_t used_bytes_ = 0;               // mutex_
  std::map<uint64_t, int64_t> lengths_;  // mutex_; of all memory, by address
  std::set<uint64_t> streams_;           // mutex_
};

}  // namespace kvx
