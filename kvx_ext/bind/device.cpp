#include "device.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <string>
#include <vector>

#include "blocks.h"
#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

nb::dict info_dict(const DeviceInfo& info) {
  nb::dict result;
  result["ordinal"] = info.ordinal;
  result["name"] = info.name;
  result["uuid"] = info.uuid;
  result["pci_bus_id"] = info.pci_bus_id;
  result["total_bytes"] = info.total_bytes;
  result["compute_major"] = info.compute_major;
  result["compute_minor"] = info.compute_minor;
  result["multiprocessors"] = info.multiprocessors;
  result["copy_engines"] = info.copy_engines;
  result["numa_node"] = info.numa_node;
  result["driver_version"] = info.driver_version;
  result["has_batch_copy"] = info.has_batch_copy;
  result["has_exportable_memory"] = info.has_exportable_memory;
  result["has_stream_values"] = info.has_stream_values;
  result["is_emulated"] = info.is_emulated;
  result["kernels"] = info.kernels;
  return result;
}

PyDevice open_cuda(const std::string& library, int ordinal) {
  std::shared_ptr<Device> device;
  raise_if_error(without_gil(
      [&] { return open_cuda_device({.library = library, .ordinal = ordinal}, &device); }));
  return PyDevice(std::move(device));
}

PyDevice open_emulated(int64_t total_bytes) {
  std::shared_ptr<Device> device;
  raise_if_error(open_emulated_device(total_bytes, &device));
  return PyDevice(std::move(device));
}

nb::list list_cuda(const std::string& library) {
  std::vector<DeviceInfo> devices;
  raise_if_error(without_gil([&] { return list_cuda_devices(library, &devices); }));
  nb::list result;
  for (const DeviceInfo& info : devices) result.append(info_dict(info));
  return result;
}

nb::tuple memory_bytes(PyDevice& self) {
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
  Device& device = self.open();
  raise_if_error(without_gil([&] { return device.memory_bytes(&free_bytes, &total_bytes); }));
  return nb::make_tuple(free_bytes, total_bytes);
}

PyDeviceMemory allocate(PyDevice& self, int64_t bytes, bool is_exportable) {
  std::unique_ptr<DeviceMemory> memory;
  Device& device = self.open();
  raise_if_error(without_gil([&] { return device.allocate(bytes, is_exportable, &memory); }));
  return PyDeviceMemory(std::move(memory));
}

PyPinnedRange pin(PyDevice& self, uint64_t address, int64_t bytes) {
  std::unique_ptr<PinnedRange> range;
  Device& device = self.open();
  raise_if_error(
      without_gil([&] { return device.pin(reinterpret_cast<uint8_t*>(address), bytes, &range); }));
  return PyPinnedRange(std::move(range));
}

PyStreamMark mark(PyDevice& self, uint64_t stream) {
  std::shared_ptr<StreamMark> made;
  Device& device = self.open();
  raise_if_error(without_gil([&] { return device.mark(stream, &made); }));
  return PyStreamMark(std::move(made));
}

PyGate make_gate(PyDevice& self) {
  std::shared_ptr<Gate> gate;
  Device& device = self.open();
  raise_if_error(without_gil([&] { return device.make_gate(&gate); }));
  return PyGate(std::move(gate));
}

std::string wait_on(PyGate& self, uint64_t stream, uint32_t value) {
  Gate& gate = self.open();
  const Status status = without_gil([&] { return gate.wait_on(stream, value); });
  if (status.code() == Code::kUnavailable) return status.message();
  raise_if_error(status);
  return "";
}

int64_t check_address(PyDevice& self, uint64_t address) {
  int64_t bytes = 0;
  Device& device = self.open();
  raise_if_error(without_gil([&] { return device.check_address(address, &bytes); }));
  return bytes;
}

nb::tuple share(PyDevice& self, const PyDeviceMemory& memory) {
  SharedMemoryHandle handle;
  Device& device = self.open();
  const DeviceMemory& shared = memory.open();
  raise_if_error(without_gil([&] { return device.share(shared, &handle); }));
  return nb::make_tuple(
      nb::bytes(reinterpret_cast<const char*>(handle.bytes.data()), handle.bytes.size()), handle.fd,
      handle.size_bytes);
}

PyDeviceMemory open_shared(PyDevice& self, const nb::bytes& bytes, int fd, int64_t size_bytes) {
  const auto* first = reinterpret_cast<const uint8_t*>(bytes.c_str());
  const SharedMemoryHandle handle{{first, first + bytes.size()}, fd, size_bytes};
  std::unique_ptr<DeviceMemory> memory;
  Device& device = self.open();
  raise_if_error(without_gil([&] { return device.open_shared(handle, &memory); }));
  return PyDeviceMemory(std::move(memory));
}

bool is_reached(PyStreamMark& self) {
  bool is_reached = false;
  StreamMark& mark = self.open();
  raise_if_error(without_gil([&] { return mark.is_reached(&is_reached); }));
  return is_reached;
}

// What other libraries, and kvx itself, recognise as memory of a device.
nb::dict cuda_array_interface(PyDeviceMemory& self) {
  nb::dict result;
  result["shape"] = nb::make_tuple(self.open().bytes());
  result["typestr"] = "|u1";
  result["data"] = nb::make_tuple(self.open().address(), false);
  result["strides"] = nb::none();
  result["version"] = 3;
  return result;
}

nb::tuple share_at(PyDevice& self, uint64_t address, int64_t bytes) {
  SharedMemoryHandle handle;
  int64_t offset = 0;
  Device& device = self.open();
  raise_if_error(without_gil([&] { return device.share_at(address, bytes, &handle, &offset); }));
  return nb::make_tuple(
      nb::bytes(reinterpret_cast<const char*>(handle.bytes.data()), handle.bytes.size()), handle.fd,
      handle.size_bytes, offset);
}

void note_host_access(PyDevice& self, uint64_t address, const Blocks& blocks, bool is_write) {
  Device& device = self.open();
  RowCursor rows(rows_of(blocks));
  constexpr int64_t kWholeRow = std::numeric_limits<int64_t>::max();
  for (Run run = rows.next(kWholeRow); run.bytes > 0; run = rows.next(kWholeRow)) {
    const uint64_t at = address + static_cast<uint64_t>(run.offset);
    device.note_host_access(reinterpret_cast<const void*>(at), run.bytes, is_write);
  }
}

bool wait_pinned(PyPinnedRange& self, double timeout_s) {
  bool is_done = false;
  PinnedRange& range = self.open();
  raise_if_error(without_gil([&] { return range.wait(timeout_s, &is_done); }));
  return is_done;
}

// What `close` and `with` are on everything that a device makes.
template <typename Native>
void bind_closing(nb::class_<Owned<Native>>& type, const char* enter, const char* closing) {
  type.def(
          "__enter__", [](nb::object self) { return self; }, nb::sig(enter), "Nothing but itself.")
      .def(
          "__exit__", [](Owned<Native>& self, nb::args) { self.close(); },
          nb::sig("def __exit__(self, *exception: object) -> None"), "Close it.")
      .def("close", &Owned<Native>::close, closing);
}

void bind_memory_of_device(nb::module_& module) {
  nb::class_<PyDeviceMemory> memory(
      module, "DeviceMemory",
      "Memory of a device, freed by `close` or with the last reference; no copy on it may be in "
      "flight then. Keeps the device.");
  memory
      .def_prop_ro(
          "address", [](PyDeviceMemory& self) { return self.open().address(); },
          "Address of the first byte, of the device.")
      .def_prop_ro(
          "bytes", [](PyDeviceMemory& self) { return self.open().bytes(); },
          "Size; of exportable memory after rounding up.")
      .def_prop_ro(
          "is_exportable", [](PyDeviceMemory& self) { return self.open().is_exportable(); },
          "Whether it is shared by file descriptor rather than by handle.")
      .def_prop_ro(
          "device", [](PyDeviceMemory& self) { return self.open().ordinal(); },
          "Number of its device; -1 for the emulation.")
      .def_prop_ro("__cuda_array_interface__", &cuda_array_interface,
                   nb::sig("def __cuda_array_interface__(self) -> dict[str, object]"),
                   "The memory as (bytes,) uint8 for libraries that use CUDA.");
  bind_closing(memory, "def __enter__(self) -> DeviceMemory",
               "Free it. What uses it afterwards is undefined. May wait for the device.");

  nb::class_<PyPinnedRange> range(module, "PinnedRange",
                                  "Host memory that is being registered with a device; "
                                  "unregistered by `close` or with the last reference. The caller "
                                  "keeps the memory itself.");
  range
      .def_prop_ro(
          "pinned_bytes", [](PyPinnedRange& self) { return self.open().pinned_bytes(); },
          "Bytes registered so far.")
      .def_prop_ro(
          "bytes", [](PyPinnedRange& self) { return self.open().bytes(); }, "Bytes in all.")
      .def("wait", &wait_pinned, "timeout_s"_a,
           "Wait without the GIL until every piece was tried; False when time is up. Raises what "
           "the driver said of the first piece that it refused; copies there work all the same.");
  bind_closing(range, "def __enter__(self) -> PinnedRange",
               "Unregister it. No copy on it may be in flight. Waits for the pinning thread.");
}

void bind_points(nb::module_& module) {
  nb::class_<PyStreamMark>(module, "StreamMark",
                           "A point in a stream, which copies can be told to follow.")
      .def("is_reached", &is_reached,
           "Whether the work before it has ended; never blocks. Raises TransferError when the "
           "device has failed.");
  nb::class_<PyGate>(module, "Gate", "A counter that streams can wait for; it only grows.")
      .def(
          "advance", [](PyGate& self, uint32_t value) { self.open().advance(value); }, "value"_a,
          "Raise the counter to `value`, if it is lower. Thread-safe, does not block.")
      .def_prop_ro(
          "value", [](PyGate& self) { return self.open().value(); }, "The counter.")
      .def("wait_on", &wait_on, "stream"_a, "value"_a,
           "Make a stream wait until the counter has reached `value`: empty, or why the driver "
           "cannot, which is no error. Raises UsageError for the null stream.");
}

void bind_streams(nb::class_<PyDevice>& device) {
  device
      .def(
          "create_stream",
          [](PyDevice& self) {
            uint64_t stream = 0;
            Device& native = self.open();
            raise_if_error(without_gil([&] { return native.create_stream(&stream); }));
            return stream;
          },
          "A stream of its own, as a CUstream; for tests and benchmarks.")
      .def(
          "destroy_stream",
          [](PyDevice& self, uint64_t stream) {
            Device& native = self.open();
            raise_if_error(without_gil([&] { return native.destroy_stream(stream); }));
          },
          "stream"_a, "Destroy a stream; what is in it still runs.")
      .def(
          "stream_synchronize",
          [](PyDevice& self, uint64_t stream) {
            Device& native = self.open();
            raise_if_error(without_gil([&] { return native.synchronize_stream(stream); }));
          },
          "stream"_a, "Wait without the GIL, and without a bound, until a stream is idle.")
      .def(
          "fill",
          [](PyDevice& self, uint64_t address, uint8_t value, int64_t bytes, uint64_t stream) {
            Device& native = self.open();
            raise_if_error(without_gil([&] { return native.fill(address, value, bytes, stream); }));
          },
          "address"_a, "value"_a, "bytes"_a, "stream"_a,
          "Set device memory to a value, in stream order.");
}

void bind_sharing(nb::class_<PyDevice>& device) {
  device
      .def("share", &share, "memory"_a,
           nb::sig("def share(self, memory: DeviceMemory) -> tuple[bytes, int, int]"),
           "What another process needs to map memory of this device: (bytes, fd, size_bytes). The "
           "descriptor, -1 for memory that is not exportable, is the caller's to send and close.")
      .def("share_at", &share_at, "address"_a, "bytes"_a,
           nb::sig("def share_at(self, address: int, bytes: int) -> tuple[bytes, int, int, int]"),
           "As `share`, for memory of this device whoever allocated it: (bytes, fd, size_bytes, "
           "offset) of the allocation it lies in, and where. Raises UnavailableError when its "
           "allocator made it so that it cannot be shared.")
      .def(
          "can_reach",
          [](PyDevice& self, int ordinal) {
            Device& device = self.open();
            const Status status = without_gil([&] { return device.can_reach(ordinal); });
            if (status.code() == Code::kUnavailable) return status.message();
            raise_if_error(status);
            return std::string();
          },
          "ordinal"_a,
          "Empty when copies of this device reach memory of another one directly, else why not.")
      .def("note_host_access", &note_host_access, "address"_a, "blocks"_a.noconvert(), "is_write"_a,
           "Announce that the CPU reads or writes blocks, (n, 4) int64 rows, that copies use. "
           "Nothing on a real driver; the simulated one finds races with it.")
      .def("open_shared", &open_shared, "bytes"_a, "fd"_a, "size_bytes"_a,
           "Map what another process shared. The sender must keep it meanwhile. `fd` stays the "
           "caller's.")
      .def(
          "enable_peer",
          [](PyDevice& self, PyDevice& peer) {
            Device& native = self.open();
            Device& other = peer.open();
            raise_if_error(without_gil([&] { return native.enable_peer(other); }));
          },
          "peer"_a, "Let both devices reach each other's memory. Raises UnavailableError.");
}

}  // namespace

void bind_device(nb::module_& module) {
  bind_memory_of_device(module);
  bind_points(module);
  nb::class_<PyDevice> device(module, "Device",
                              "A GPU, or host memory that plays one. What it makes keeps it. "
                              "Thread-safe.");
  device
      .def(
          "info", [](PyDevice& self) { return info_dict(self.open().info()); },
          nb::sig("def info(self) -> dict[str, object]"), "What the device is and can do.")
      .def("close", &PyDevice::close,
           "Let go of the device; what it made keeps it open. Later calls raise UsageError.")
      .def("memory_bytes", &memory_bytes, nb::sig("def memory_bytes(self) -> tuple[int, int]"),
           "Bytes that are free, and in all.")
      .def("allocate", &allocate, "bytes"_a, "is_exportable"_a = false,
           "Device memory. Raises CapacityError when there is not that much.")
      .def("pin", &pin, "address"_a, "bytes"_a,
           "Start registering host memory, which begins at a multiple of 4096, in the background.")
      .def("mark", &mark, "stream"_a,
           "A point behind what is in a stream (a CUstream) now. Raises UsageError for the null "
           "stream.")
      .def("make_gate", &make_gate, "A counter at 0 that streams can wait for.")
      .def("check_address", &check_address, "address"_a,
           "Bytes there are from a device address on. Raises UsageError where it is not memory of "
           "this device.")
      .def(
          "health", [](PyDevice& self) { return self.open().health().message(); },
          "Empty, or the error that ended the device for this process or lost part of it.");
  bind_streams(device);
  bind_sharing(device);
  module.def("open_cuda_device", &open_cuda, "library"_a = "libcuda.so.1", "ordinal"_a = 0,
             "A GPU by its number. Raises UnavailableError with what is missing.");
  module.def("open_emulated_device", &open_emulated, "total_bytes"_a,
             "Host memory that plays a device: copies are memory copies on threads.");
  module.def(
      "list_cuda_devices", &list_cuda, "library"_a = "libcuda.so.1",
      nb::sig("def list_cuda_devices(library: str = \"libcuda.so.1\") -> list[dict[str, object]]"),
      "`Device.info` of every GPU, without using any. Raises UnavailableError.");
}

}  // namespace kvx::bind
