// Copies between host memory and the host memory that plays a device.
#pragma once

#include <memory>

#include "kvx/device.h"

namespace kvx {

Status make_emulated_copies(std::shared_ptr<Device> device, CopySink sink,
                            std::unique_ptr<CopyBackend>* copies);

}  // namespace kvx
