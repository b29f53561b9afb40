// One CUDA device: the factory of everything that happens on it. See kvx/device.h.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "device/cuda_context.h"
#include "device/cuda_events.h"
#include "device/cuda_gate.h"
#include "device/cuda_pinned.h"
#include "kvx/device.h"

namespace kvx {

class KernelSet;
class MappedMemory;

class CudaDevice final : public Device, public std::enable_shared_from_this<CudaDevice> {
 public:
  static Status open(const CudaDeviceOptions& options, std::shared_ptr<Device>* device);
  CudaDevice(std::unique_ptr<CudaContext> context, DeviceInfo info);
  ~CudaDevice() override;

  DeviceInfo info() const override;
  Status memory_bytes(int64_t* free_bytes, int64_t* total_bytes) override;
  Status allocate(int64_t bytes, bool is_exportable,
                  std::unique_ptr<DeviceMemory>* memory) override;
  Status pin(uint8_t* base, int64_t bytes, std::unique_ptr<PinnedRange>* range) override;
  // As pin(), with pieces of another size: the tests have no terabytes.
  Status pin_in_pieces(uint8_t* base, int64_t bytes, int64_t piece_bytes,
                       std::unique_ptr<PinnedRange>* range);
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
  Status health() const override { return context_->health(); }
  void note_host_access(const void* address, int64_t bytes, bool is_write) override;

  CudaContext& context() { return *context_; }
  const cuda::Api& api() const { return context_->api(); }
  CudaEvents& events() { return events_; }
  PinnedRegistry& pinned() { return pinned_; }
  GateWords& gate_words() { return gate_words_; }

  // The kernels of this device, loaded when they are first asked for; kUnavailable stays so.
  Status kernels(std::shared_ptr<KernelSet>* kernels);

  // Mapped memory is open to the devices that are peers now and to those that become peers later.
  Status admit_mapped(MappedMemory* memory);
  void dismiss_mapped(MappedMemory* memory) noexcept;

 private:
  Status share_plain(uint64_t base, int64_t bytes, SharedMemoryHandle* handle);
  Status share_mapped(uint64_t base, int64_t bytes, SharedMemoryHandle* handle);
  Status open_to(cuda::DeviceOrdinal peer);  // enable_peer(), one way

  const std::unique_ptr<CudaContext> context_;
  CudaEvents events_;
  PinnedRegistry pinned_;
  GateWords gate_words_;
  std::mutex kernels_mutex_;            // held while they are loaded; taken before mutex_
  std::shared_ptr<KernelSet> kernels_;  // kernels_mutex_
  Status kernels_status_;               // kernels_mutex_
  mutable std::mutex mutex_;
  DeviceInfo info_;                         // mutex_; only `kernels` changes
  std::vector<cuda::DeviceOrdinal> peers_;  // mutex_; that may use this device's memory
  std::vector<MappedMemory*> mapped_;       // mutex_
};

// Is this a stream that marks and gates can name? The legacy default stream orders everything.
Status check_stream(uint64_t stream);

}  // namespace kvx
