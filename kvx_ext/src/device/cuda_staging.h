// Copies by way of device memory: many fragments on the device, one contiguous run on the host.
//
//   to the device:   lane stream:   [host -> slot]        kernel stream: [scatter slot -> targets]
//   from the device: kernel stream: [gather -> slot]      lane stream:   [slot -> host]
//
// The staging memory is a ring of slots, so that the copy of one slice and the kernel of another
// run at the same time. Each slot has a table of fragments in pinned host memory, which is written
// again only when the slot's last use is over.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "device/cuda_device.h"
#include "kernels/kernel_set.h"
#include "kvx/memory.h"

namespace kvx {

// Of one lane; used by its submitting thread.
class CudaStaging {
 public:
  // Null without an error: this device has no kernels, the options want none, or too little memory
  // is given for it.
  static Status create(const std::shared_ptr<CudaDevice>& device, CopyDirection direction,
                       const CopyOptions& options, cuda::Stream lane_stream,
                       std::unique_ptr<CudaStaging>* staging);
  // REQUIRES: no copy is in flight.
  ~CudaStaging();
  CudaStaging(const CudaStaging&) = delete;
  CudaStaging& operator=(const CudaStaging&) = delete;

  int64_t bytes() const { return bytes_; }
  cuda::Stream kernel_stream() const { return kernel_stream_; }

  // REQUIRES for all: the context is current. After an error some of it may be under way, in both
  // streams.

  // Makes the kernels of a group follow what the lane's stream waits for. Once before its copies.
  cuda::Result begin();
  // Enqueues a kStaged call, and counts it.
  cuda::Result copy(const CopyCall& call, const CopyRuns& runs, CopyStats* stats);
  // Records `event` where all of the group precedes it, in both streams.
  cuda::Result end(cuda::Event event);

 private:
  static constexpr int64_t kSlots = 8;
  static constexpr int64_t kSlotBytesMin = 64 << 10;
  static constexpr size_t kFragmentsMax = 4096;  // of a slice
  static constexpr int64_t kTableBytes = kFragmentsMax * sizeof(kernel::Fragment);

  struct Slot {
    uint64_t data = 0;                          // device
    kernel::Fragment* fragments = nullptr;      // pinned
    cuda::DevicePointer fragments_address = 0;  // the same, as the kernel sees it
    PooledEvent half;                           // the first of its two steps is over
    PooledEvent done;
  };

  // What goes through a slot at once: on the host side one run.
  struct Slice {
    uint64_t host = 0;
    uint64_t bytes = 0;
    uint64_t longest = 0;
    size_t fragments = 0;
  };

  CudaStaging(const std::shared_ptr<CudaDevice>& device, CopyDirection direction, int ctas,
              cuda::Stream lane_stream)
      : device_(*device),
        context_(device->context()),
        direction_(direction),
        ctas_(ctas),
        lane_stream_(lane_stream) {}
  Status set_up(int64_t bytes);
  Status make_slots();

  cuda::Result take_slot(Slot** slot);
  cuda::Result flush(Slot* slot, const Slice& slice, CopyStats* stats);
  cuda::Result launch(Slot* slot, const Slice& slice, CopyStats* stats);
  cuda::Result join(cuda::Stream waiting, cuda::Event event, cuda::Stream recorded);

  CudaDevice& device_;
  CudaContext& context_;
  const CopyDirection direction_;
  const int ctas_;
  const cuda::Stream lane_stream_;
  std::shared_ptr<KernelSet> kernels_;
  int64_t bytes_ = 0;
  uint64_t slot_bytes_ = 0;
  cuda::DevicePointer memory_ = 0;
  cuda::Stream kernel_stream_ = nullptr;
  std::unique_ptr<HostRegion> tables_;
  bool has_registered_ = false;
  PooledEvent fork_;  // of begin() and end()
  std::vector<Slot> slots_;
  size_t next_slot_ = 0;
  bool is_doubtful_ = false;  // an error left work behind that no event tells of
};

}  // namespace kvx
