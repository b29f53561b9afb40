#include "kernels.h"

#include <cstring>
#include <functional>
#include <tuple>
#include <utility>

// Without CUDA, `portable.h` makes plain C++ of these.
#include "kernels/copy.cu"
#include "kernels/permute.cu"
#include "kernels/quantise.cu"

namespace kvx::sim {

namespace {

// Ends a run from inside a kernel, which has no other way out.
struct AccessRefused {};

// The thread of the grid that this thread of the machine is running.
struct Running {
  MemoryAccess* access = nullptr;
  uint64_t index = 0;
  uint64_t count = 0;
};
thread_local Running running;

struct Kernel {
  std::string_view name;
  std::vector<size_t> parameter_bytes;
  std::function<void(void**)> run;  // one thread
};

template <typename T>
T parameter(void** parameters, size_t index) {
  T value;
  std::memcpy(static_cast<void*>(&value), parameters[index], sizeof(T));
  return value;
}

template <typename... Parameters>
Kernel kernel_of(std::string_view name, void (*function)(Parameters...)) {
  return {name, {sizeof(Parameters)...}, [function](void** parameters) {
            [&]<size_t... Index>(std::index_sequence<Index...>) {
              function(parameter<Parameters>(parameters, Index)...);
            }(std::index_sequence_for<Parameters...>());
          }};
}

const std::vector<Kernel>& kernels() {
#define KVX_SIM_KERNEL(name) kernel_of(#name, kernel::name)
  static const std::vector<Kernel> all = {
      KVX_SIM_KERNEL(kvx_copy_fragments), KVX_SIM_KERNEL(kvx_poison),
      KVX_SIM_KERNEL(kvx_permute),        KVX_SIM_KERNEL(kvx_reshard),
      KVX_SIM_KERNEL(kvx_amax),           KVX_SIM_KERNEL(kvx_scale),
      KVX_SIM_KERNEL(kvx_quantise_fp8),   KVX_SIM_KERNEL(kvx_dequantise_fp8),
  };
#undef KVX_SIM_KERNEL
  return all;
}

const Kernel* find(std::string_view name) {
  for (const Kernel& each : kernels()) {
    if (each.name == name) return &each;
  }
  return nullptr;
}

}  // namespace

std::vector<size_t> kernel_parameter_bytes(std::string_view name) {
  const Kernel* found = find(name);
  return found != nullptr ? found->parameter_bytes : std::vector<size_t>{};
}

std::vector<std::string_view> kernel_names() {
  std::vector<std::string_view> names;
  for (const Kernel& each : kernels()) names.push_back(each.name);
  return names;
}

bool run_kernel(std::string_view name, Dim3 grid, Dim3 block, void** parameters,
                MemoryAccess& access) {
  const Kernel* found = find(name);
  if (found == nullptr) return false;
  const uint64_t block_threads = uint64_t{block.x} * block.y * block.z;
  const Running outer = running;  // a driver may run a kernel while it resolves for another
  running = {&access, 0, uint64_t{grid.x} * grid.y * grid.z * block_threads};
  bool is_done = true;
  try {
    for (; running.index < running.count; ++running.index) found->run(parameters);
  } catch (const AccessRefused&) {
    is_done = false;
  }
  running = outer;
  return is_done;
}

}  // namespace kvx::sim

namespace kvx::kernel {

uint64_t thread_index() { return sim::running.index; }
uint64_t thread_count() { return sim::running.count; }

void* resolve(uint64_t address, uint64_t bytes, bool is_write) {
  // Every load and store is as wide as its alignment, up to 16 bytes.
  const uint64_t alignment = bytes < 16 ? bytes : 16;
  void* found =
      address % alignment == 0 ? sim::running.access->resolve(address, bytes, is_write) : nullptr;
  if (found == nullptr) throw sim::AccessRefused();
  return found;
}

}  // namespace kvx::kernel
