// A device and what it makes, as Python owns them.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <utility>

#include "bind.h"
#include "kvx/device.h"

namespace kvx::bind {

// Letting go of the last one may wait for the driver: never under the GIL.
template <typename Native>
struct Owned {
  std::shared_ptr<Native> native;

  explicit Owned(std::shared_ptr<Native> made) : native(std::move(made)) {}
  Owned(Owned&&) noexcept = default;
  Owned& operator=(Owned&&) noexcept = default;
  ~Owned() { close(); }

  void close() {
    if (native == nullptr) return;
    nanobind::gil_scoped_release release;
    native.reset();
  }

  // Raises UsageError once it was closed.
  Native& open() const {
    if (native == nullptr) raise_if_error({Code::kUsage, "it was closed"});
    return *native;
  }
};

using PyDevice = Owned<Device>;
using PyDeviceMemory = Owned<DeviceMemory>;
using PyPinnedRange = Owned<PinnedRange>;
using PyStreamMark = Owned<StreamMark>;
using PyGate = Owned<Gate>;

}  // namespace kvx::bind
