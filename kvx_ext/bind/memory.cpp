#include "kvx/memory.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/unique_ptr.h>

#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

std::unique_ptr<HostRegion> make_region(int64_t bytes, bool is_shared, int numa_node) {
  std::unique_ptr<HostRegion> region;
  raise_if_error(HostRegion::create(bytes, is_shared ? RegionKind::kMemfd : RegionKind::kAnonymous,
                                    numa_node, &region));
  return region;
}

// A flag that Python can raise while another thread is inside prefault().
class StopFlag {
 public:
  void set() { flag_.store(true); }
  const std::atomic<bool>* get() const { return &flag_; }

 private:
  std::atomic<bool> flag_{false};
};

}  // namespace

void bind_memory(nb::module_& module) {
  nb::class_<StopFlag>(module, "StopFlag", "Asks a running `HostRegion.prefault` to return early.")
      .def(nb::init<>())
      .def("set", &StopFlag::set, "Raise the flag; it cannot be lowered. Thread-safe.");

  nb::class_<HostRegion>(
      module, "HostRegion",
      "Page-aligned host memory, with huge pages asked for. Freed when the last array on it dies.")
      .def(nb::new_(&make_region), "bytes"_a, "is_shared"_a = false, "numa_node"_a = -1,
           "Map `bytes` (rounded up to 4096); `is_shared` backs it with a memfd. Pages arrive on "
           "first touch or by `prefault`. Raises CapacityError when the kernel refuses.")
      .def_prop_ro(
          "address", [](const HostRegion& self) { return reinterpret_cast<intptr_t>(self.data()); },
          "Address of the first byte; a multiple of 4096, of 2 MiB for regions that big.")
      .def_prop_ro("bytes", &HostRegion::bytes, "Size after rounding up.")
      .def_prop_ro("fd", &HostRegion::fd, "File descriptor of a shared region, else -1.")
      .def_prop_ro("prefaulted_bytes", &HostRegion::prefaulted_bytes,
                   "Progress of `prefault`; may be read from any thread meanwhile.")
      .def(
          "prefault",
          [](HostRegion& self, int threads, const StopFlag* stop) {
            Status status;
            {
              nb::gil_scoped_release release;
              status = self.prefault(threads, stop == nullptr ? nullptr : stop->get());
            }
            if (status.code() == Code::kCancelled) return false;
            raise_if_error(status);
            return true;
          },
          "threads"_a, "stop"_a = nb::none(),
          "Populate all pages on `threads` threads without the GIL. False when stopped early.")
      .def(
          "array",
          [](HostRegion& self) {
            return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(
                self.data(), {static_cast<size_t>(self.bytes())}, nb::find(self));
          },
          "The whole region as a writable (bytes,) uint8 array that keeps it alive.");

  module.def("numa_node_count", &numa_node_count, "NUMA nodes of this machine; at least 1.");
}

}  // namespace kvx::bind
