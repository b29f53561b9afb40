// One GPU as kvx sees it: memory, pinned host memory, copies, and points in other people's streams.
//
//   std::shared_ptr<Device> device;
//   Status status = open_cuda_device({.library = "libcuda.so.1", .ordinal = 0}, &device);
//   std::unique_ptr<DeviceMemory> memory;
//   status = device->allocate(1 << 30, /*is_exportable=*/false, &memory);
//   std::unique_ptr<CopyBackend> copies;
//   status = device->make_copies({}, sink, &copies);
//   copies->submit({.direction = CopyDirection::kDeviceToHost, .runs = runs, .token = 1});
//
// Two implementations: the CUDA driver, and an emulation in host memory for machines without a GPU,
// where a "device address" is a host address. Nothing here launches a kernel unless `sm` allows it.
// Everything made by a device keeps it alive.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kvx/copy_plan.h"
#include "kvx/status.h"

namespace kvx {

struct DeviceInfo {
  int ordinal = -1;  // -1: the emulation
  std::string name;
  std::string uuid;        // 32 hexadecimal digits
  std::string pci_bus_id;  // "0000:17:00.0"
  int64_t total_bytes = 0;
  int compute_major = 0;
  int compute_minor = 0;
  int multiprocessors = 0;
  int copy_engines = 0;
  int numa_node = -1;      // of the host memory nearest to it; -1: unknown
  int driver_version = 0;  // 13000 is 13.0
  bool has_batch_copy = false;
  bool has_exportable_memory = false;  // VMM allocations with file descriptors
  bool has_stream_values = false;      // streams can wait for a word of host memory
  bool is_emulated = false;
  // "fatbin", "nvrtc", or why there are none; "not asked for" until copies that may use SMs were
  // made, because loading them may take a compiler.
  std::string kernels = "not asked for";
};

// What lies in device memory; freed by its destructor. REQUIRES then: no copy on it is in flight.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual uint64_t address() const = 0;
  virtual int64_t bytes() const = 0;  // exportable: rounded up to what the driver can map
  virtual bool is_exportable() const = 0;
  virtual int ordinal() const = 0;  // of its device; -1: the emulation
};

// Host memory registered with the device in pieces of kPinnedPieceBytes, counted from its start, on
// a background thread. Copies that meet a piece that is not registered yet register it themselves.
// Unregistered by its destructor, which waits for the thread. REQUIRES then: no copy in flight.
inline constexpr int64_t kPinnedPieceBytes = int64_t{1} << 30;

class PinnedRange {
 public:
  virtual ~PinnedRange() = default;
  virtual uint8_t* base() const = 0;
  virtual int64_t bytes() const = 0;
  virtual int64_t pinned_bytes() const = 0;  // grows to bytes(); any thread may read it
  // True once every piece was tried. The Status is that of the first piece the driver refused:
  // copies that meet it work all the same, as copies of pageable memory (CopyStats counts them).
  virtual Status wait(double timeout_s, bool* is_done) = 0;
};

// A point in a stream of somebody else, made when the work before it had been enqueued.
class StreamMark {
 public:
  virtual ~StreamMark() = default;
  // Whether that work has ended. Never blocks. kDevice: the device has failed, and it never will.
  virtual Status is_reached(bool* is_reached) = 0;
};

// A counter in pinned host memory that streams can wait for without a CPU: layers that have
// arrived, or 1 when a transfer is over. It only grows.
class Gate {
 public:
  virtual ~Gate() = default;
  virtual void advance(uint32_t value) = 0;  // never lowers it; any thread; does not block
  virtual uint32_t value() const = 0;
  // Makes `stream` (a CUstream) wait until the counter has reached `value`. kUnavailable where the
  // driver cannot: wait on the CPU then. Whoever owns the gate must reach every value in the end,
  // also when the transfer fails, or the stream never goes on.
  virtual Status wait_on(uint64_t stream, uint32_t value) = 0;
};

// Nothing orders requests but their completions. REQUIRES: no run is partly inside a pinned range.
struct CopyRequest {
  CopyDirection direction = CopyDirection::kHostToDevice;
  CopyRuns runs;
  uint64_t token = 0;                 // handed back in the completion
  std::shared_ptr<StreamMark> after;  // null: may begin at once
};

struct CopyCompletion {
  uint64_t token = 0;
  Code code = Code::kOk;  // kDevice: the driver failed it; kCancelled: it had not begun
  int driver_error = 0;   // CUresult behind kDevice
};

using CopySink = std::function<void(std::span<const CopyCompletion>)>;

struct CopyStats {
  std::array<int64_t, kCopyDirections> bytes{};
  std::array<int64_t, kCopyDirections> requests{};
  std::array<int64_t, kCopyMethods> runs_by_method{};   // after merging
  std::array<int64_t, kCopyMethods> calls_by_method{};  // into the driver
  int64_t kernels_launched = 0;
  int64_t pageable_bytes = 0;  // of host memory that was not registered
  int64_t submit_ns = 0;       // host time from taking requests to handing them to the driver
  int64_t prepare_ns = 0;      // of that, before the driver was asked for a copy
  int64_t in_flight = 0;
};

// Streams of one user on one device. The contract of IoBackend holds: submit() never waits for the
// device or the driver; every request gets exactly one completion, also after cancel() and close();
// until then its memory belongs to the copies; the sink is called on the backend's threads, must
// not block, and may call submit() and cancel(). A completion says that the bytes are there for
// every CPU and every stream.
class CopyBackend {
 public:
  virtual ~CopyBackend() = default;
  virtual void submit(CopyRequest request) = 0;
  // What the driver has not been given yet completes as kCancelled; the rest runs out.
  virtual void cancel(uint64_t token) = 0;
  // As IoBackend::close(): returns the number of requests abandoned in the driver.
  virtual int64_t close(double timeout_s) = 0;
  virtual CopyStats stats() const = 0;
};

enum class SmUse : uint8_t {
  kNever,  // copy engines only: no kernel is launched, whatever the plan would like
  kAuto,   // small fragments may be scattered and gathered by a few CTAs
};

struct CopyOptions {
  SmUse sm = SmUse::kAuto;
  int ctas = 4;                               // of a kernel that scatters or gathers
  int64_t staging_bytes = int64_t{64} << 20;  // device memory for it, a direction; 0: none
  CopyCalibration calibration = {};           // see copy_plan.h; of this device
};

// What another process needs to map this memory; see open_shared(). Bytes that travel as they are.
struct SharedMemoryHandle {
  std::vector<uint8_t> bytes;  // cuIpcMemHandle, offset and size; empty for exportable memory
  int fd = -1;                 // of exportable memory; the receiver of it owns it
  int64_t size_bytes = 0;
};

// Thread-safe.
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceInfo info() const = 0;
  virtual Status memory_bytes(int64_t* free_bytes, int64_t* total_bytes) = 0;

  // Exportable memory can be shared by file descriptor (see share()), plain memory by IPC handle.
  // kCapacity: the device has not that much free.
  virtual Status allocate(int64_t bytes, bool is_exportable,
                          std::unique_ptr<DeviceMemory>* memory) = 0;
  // Starts registering [base, base + bytes); base is a multiple of kAlignment.
  virtual Status pin(uint8_t* base, int64_t bytes, std::unique_ptr<PinnedRange>* range) = 0;

  virtual Status make_copies(const CopyOptions& options, CopySink sink,
                             std::unique_ptr<CopyBackend>* copies) = 0;
  // Of a stream given as CUstream. kUsage for the null stream: work on it orders everything.
  virtual Status mark(uint64_t stream, std::shared_ptr<StreamMark>* mark) = 0;
  virtual Status make_gate(std::shared_ptr<Gate>* gate) = 0;

  // Is `address` memory of this device? For kUsage errors before anything is submitted. `bytes` is
  // how many there are from it on, in the same allocation.
  virtual Status check_address(uint64_t address, int64_t* bytes) = 0;

  virtual Status share(const DeviceMemory& memory, SharedMemoryHandle* handle) = 0;
  // The same for memory of this device whoever allocated it: `handle` is of the allocation that
  // [address, address + bytes) lies in, `offset` where in it that begins. kUnavailable: its
  // allocator made it so that it cannot be shared, or it lies in several allocations.
  virtual Status share_at(uint64_t address, int64_t bytes, SharedMemoryHandle* handle,
                          int64_t* offset) = 0;
  // Whether copies on this device can reach memory of another one directly, by its number.
  // kUnavailable: they cannot.
  virtual Status can_reach(int ordinal) = 0;
  // Maps memory that another process shared; the sender must keep it until the mapping is gone.
  virtual Status open_shared(const SharedMemoryHandle& handle,
                             std::unique_ptr<DeviceMemory>* memory) = 0;
  // Lets copies run between this device and `peer` directly. kUnavailable: the devices cannot.
  virtual Status enable_peer(Device& peer) = 0;

  // Streams for whoever has no framework at hand that makes them, and work to put into them.
  virtual Status create_stream(uint64_t* stream) = 0;
  virtual Status destroy_stream(uint64_t stream) = 0;
  virtual Status synchronize_stream(uint64_t stream) = 0;  // may block for ever
  virtual Status fill(uint64_t address, uint8_t value, int64_t bytes, uint64_t stream) = 0;

  // kDevice: the error that ended the device for this process (an illegal address, an ECC error).
  // kCapacity: it works, but the driver refused to take something back, which is lost.
  virtual Status health() const = 0;

  // Announces that kvx's CPU code reads or writes memory that copies use. Nothing on a real driver;
  // the simulated one finds races with it.
  virtual void note_host_access(const void* address, int64_t bytes, bool is_write) = 0;
};

struct CudaDeviceOptions {
  std::string library = "libcuda.so.1";
  int ordinal = 0;
};

// kUnavailable with the reason: no driver, no device of that number, too old a driver.
Status open_cuda_device(const CudaDeviceOptions& options, std::shared_ptr<Device>* device);
// What open_cuda_device() would find. kUnavailable as there.
Status list_cuda_devices(const std::string& library, std::vector<DeviceInfo>* devices);
// Host memory that plays a device: copies are memory copies on threads of its own.
Status open_emulated_device(int64_t total_bytes, std::shared_ptr<Device>* device);

}  // namespace kvx
