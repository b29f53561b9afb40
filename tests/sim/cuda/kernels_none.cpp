// A device without kernels. Weak: a real table that is linked in takes its place.
#include "kernels.h"

namespace kvx::sim {

[[gnu::weak]] std::vector<size_t> kernel_parameter_bytes(std::string_view /*name*/) { return {}; }

[[gnu::weak]] bool run_kernel(std::string_view /*name*/, Dim3 /*grid*/, Dim3 /*block*/,
                              void** /*parameters*/, MemoryAccess& /*access*/) {
  return false;
}

}  // namespace kvx::sim
