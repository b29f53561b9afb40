// kvx's kernels as plain C++, for the simulated driver: the very files that nvcc compiles, with
// every access to memory handed to whoever knows what may be touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace kvx::sim {

struct Dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
};

// Resolves a device (or registered host) address for a kernel's access; null when out of bounds.
class MemoryAccess {
 public:
  virtual ~MemoryAccess() = default;
  virtual uint8_t* resolve(uint64_t address, size_t bytes, bool is_write) = 0;
};

// Sizes of a kernel's parameters in order, empty when there is no such kernel.
std::vector<size_t> kernel_parameter_bytes(std::string_view name);

// Names of all kernels.
std::vector<std::string_view> kernel_names();

// Runs every thread of the grid on this thread; false when an access was refused, which ends the
// run, or when there is no such kernel. A misaligned access is refused, as on a GPU.
bool run_kernel(std::string_view name, Dim3 grid, Dim3 block, void** parameters,
                MemoryAccess& access);

}  // namespace kvx::sim
