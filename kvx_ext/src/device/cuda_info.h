// What a CUDA device says about itself.
#pragma once

#include "kvx/device.h"
#include "shim/cuda/loader.h"

namespace kvx {

Status describe_device(const cuda::Driver& driver, int ordinal, DeviceInfo* info);

}  // namespace kvx
