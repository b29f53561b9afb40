#include <vector>

#include "kernels.h"

namespace kvx {

std::span<const ChecksumKernel> checksum_kernels() {
  static const std::vector<ChecksumKernel> usable = [] {
    std::vector<ChecksumKernel> found;
    __builtin_cpu_init();
    const bool has_wide = __builtin_cpu_supports("vpclmulqdq") != 0;
    if (has_wide && __builtin_cpu_supports("avx512f")) found.push_back(crc64::kVpclmul512Kernel);
    if (has_wide && __builtin_cpu_supports("avx2")) found.push_back(crc64::kVpclmul256Kernel);
    if (__builtin_cpu_supports("pclmul")) found.push_back(crc64::kPclmul128Kernel);
    found.push_back(crc64::kPortableKernel);
    return found;
  }();
  return usable;
}

}  // namespace kvx
