// The lanes of one user on one CUDA device.
#pragma once

#include <memory>

#include "device/cuda_device.h"

namespace kvx {

Status make_cuda_copies(std::shared_ptr<CudaDevice> device, const CopyOptions& options,
                        CopySink sink, std::unique_ptr<CopyBackend>* copies);

}  // namespace kvx
