// The kernels as the build embedded them: compiled, where it had nvcc, and as text, always.
#pragma once

#include <span>
#include <string_view>

namespace kvx {

// What cuModuleLoadData takes; empty where the build had no nvcc or was not to use it.
std::span<const unsigned char> kernel_fatbin();

// One CUDA source that includes nothing; ends with a zero that is not counted.
std::string_view kernel_source();

}  // namespace kvx
