#include <nanobind/stl/shared_ptr.h>

#include "bind.h"
#include "device.h"
#include "kvx/layer_progress.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

void bind_layers(nb::module_& module) {
  nb::class_<LayerProgress>(module, "LayerProgress",
                            "How many leading layers of one transfer have arrived, over all jobs "
                            "that bring them. Thread-safe.")
      .def(nb::new_([](int layers, const PyDevice* device) {
             if (layers < 1) raise_if_error({Code::kUsage, "a transfer has at least one layer"});
             return std::make_shared<LayerProgress>(layers,
                                                    device != nullptr ? device->native : nullptr);
           }),
           "layers"_a, "device"_a.none(), "Streams can wait with a device. Raises UsageError.")
      .def_prop_ro("layers", &LayerProgress::layers, "How many there are.")
      .def("ready", &LayerProgress::ready, "How many leading ones have arrived.")
      .def("seal", &LayerProgress::seal, "No more jobs will join: layers may count from now on.")
      .def("finish", &LayerProgress::finish, "The transfer is over: everybody goes on.")
      .def("wait", &LayerProgress::wait, "layers"_a, "timeout_s"_a,
           nb::call_guard<nb::gil_scoped_release>(),
           "Wait without the GIL until so many have arrived. False when time was up.")
      .def(
          "wait_on",
          [](LayerProgress& self, uint64_t stream, int layers) {
            Status status;
            {
              nb::gil_scoped_release release;
              status = self.wait_on(stream, layers);
            }
            raise_if_error(status);
          },
          "stream"_a, "layers"_a,
          "Make a CUstream wait until so many have arrived. Raises UsageError, UnavailableError.");
}

}  // namespace kvx::bind
