// The kernels of the simulated device: plain C++ that runs behind cuLaunchKernel. The table of them
// is linked in from elsewhere; kernels_none.cpp stands in for it with an empty one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace kvx::sim {

struct Dim3 {
  unsigned x, y, z;
};

// Resolves a device (or registered host) address for a kernel's access; null when out of bounds.
class MemoryAccess {
 public:
  virtual ~MemoryAccess() = default;
  virtual uint8_t* resolve(uint64_t address, size_t bytes, bool is_write) = 0;
};

// Sizes of a kernel's parameters in order, empty when there is no such kernel.
std::vector<size_t> kernel_parameter_bytes(std::string_view name);

// Runs every thread of the grid on this thread; false when an access was refused.
bool run_kernel(std::string_view name, Dim3 grid, Dim3 block, void** parameters,
                MemoryAccess& access);

}  // namespace kvx::sim
