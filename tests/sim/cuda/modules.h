// Loaded modules and the kernels taken from them. Guarded by Simulation::mutex.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace kvx::sim {

struct KernelFunction {
  uint64_t module = 0;
  std::string name;
  std::vector<size_t> parameter_bytes;
};

struct Modules {
  void reset() {
    loaded.clear();
    functions.clear();
  }

  uint64_t next_number = 1;  // goes on over a reset: no handle means something else later
  std::set<uint64_t> loaded;
  std::map<uint64_t, KernelFunction> functions;
};

}  // namespace kvx::sim
