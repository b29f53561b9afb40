#include "kernels.h"

namespace kvx {

std::span<const ChecksumKernel> checksum_kernels() { return {&crc64::kPortableKernel, 1}; }

}  // namespace kvx
