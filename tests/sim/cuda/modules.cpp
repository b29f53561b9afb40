// Modules are names only: kernels come from the table that is linked in.
#include "modules.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "copies.h"
#include "entry_points.h"
#include "kernels.h"
#include "simulation.h"

namespace kvx::sim {

namespace {

// The ranges a launch has touched in one stretch of memory; neighbours are one range.
class Footprint {
 public:
  void add(uint64_t start, uint64_t end) {
    if (!ranges_.empty() && start <= ranges_.back().second && end >= ranges_.back().first) {
      ranges_.back().first = std::min(ranges_.back().first, start);
      ranges_.back().second = std::max(ranges_.back().second, end);
    } else {
      ranges_.emplace_back(start, end);
    }
  }

  std::vector<std::pair<uint64_t, uint64_t>> merged() {
    std::sort(ranges_.begin(), ranges_.end());
    const auto all = std::exchange(ranges_, {});
    for (const auto& [start, end] : all) add(start, end);
    return ranges_;
  }

 private:
  std::vector<std::pair<uint64_t, uint64_t>> ranges_;
};

// Resolves a kernel's accesses. Asks the simulation once for each stretch of memory, because a
// kernel makes many accesses and the lock is everybody's.
class KernelAccess : public MemoryAccess {
 public:
  KernelAccess(Simulation& sim, const StreamState& stream) : sim_(sim), stream_(stream) {}

  uint8_t* resolve(uint64_t address, size_t bytes, bool is_write) override {
    Stretch* stretch = find(address, bytes);
    if (stretch == nullptr) {
      if (refused_.empty()) {
        refused_ = std::string(is_write ? "write of " : "read of ") + range_text(address, bytes);
      }
      return nullptr;
    }
    (is_write ? stretch->written : stretch->read).add(address, address + bytes);
    return stretch->bytes + (address - stretch->start);
  }

  // Hands over what was touched; under the lock.
  void note(const Operation& operation) {
    for (Stretch& stretch : stretches_) {
      note(stretch.read.merged(), false, operation);
      note(stretch.written.merged(), true, operation);
    }
  }

  [[nodiscard]] const std::string& refused() const { return refused_; }

 private:
  struct Stretch {
    uint64_t start = 0;
    uint64_t end = 0;
    uint8_t* bytes = nullptr;
    std::shared_ptr<Reservation> memory;  // null for host memory
    Footprint read;
    Footprint written;
  };

  Stretch* find(uint64_t address, size_t bytes) {
    for (Stretch& stretch : stretches_) {
      if (stretch.start <= address && address + bytes <= stretch.end) return &stretch;
    }
    std::lock_guard lock(sim_.mutex);
    Stretch found;
    if (const auto memory = sim_.memory.find(address); memory != nullptr) {
      if (!find_device(memory, address, bytes, &found)) return nullptr;
    } else if (const auto* host = sim_.memory.registration_at(address); host != nullptr) {
      found.start = host->address;
      found.end = host->address + host->bytes;
      found.bytes = reinterpret_cast<uint8_t*>(host->address);
      if (address + bytes > found.end) return nullptr;
    } else {
      return nullptr;
    }
    stretches_.push_back(std::move(found));
    return &stretches_.back();
  }

  // The mapping that the address lies in, or the access itself where it spans mappings.
  bool find_device(const std::shared_ptr<Reservation>& memory, uint64_t address, size_t bytes,
                   Stretch* found) const {
    const Device& device = *stream_.device;
    const bool is_foreign = memory->kind != ReservationKind::kVirtual &&
                            &memory->device != &device &&
                            !device.peers.contains(memory->device.ordinal);
    const size_t offset = address - memory->address;
    if (is_foreign || !memory->is_accessible(offset, bytes, device.ordinal)) return false;
    const auto mapping = memory->find(offset);
    size_t start = mapping->first;
    size_t end = mapping->first + mapping->second.bytes;
    if (offset + bytes > end) {
      start = offset;
      end = offset + bytes;
    }
    found->start = memory->address + start;
    found->end = memory->address + end;
    found->bytes = memory->alias + start;
    found->memory = memory;
    return true;
  }

  void note(const std::vector<std::pair<uint64_t, uint64_t>>& ranges, bool is_write,
            const Operation& operation) {
    for (const auto& [start, end] : ranges) {
      sim_.races.add({start, end, is_write, stream_.owner, operation.epoch, operation.label, true},
                     stream_.clock, sim_.convictions);
    }
  }

  Simulation& sim_;
  const StreamState& stream_;
  std::vector<Stretch> stretches_;
  std::string refused_;
};

// A launch with its own copy of the parameters.
struct Launch {
  KernelFunction function;
  Dim3 grid{};
  Dim3 block{};
  std::vector<std::vector<uint8_t>> parameters;

  void run(Simulation& sim, std::unique_lock<std::mutex>& lock, StreamState& stream,
           const Operation& operation) {
    EngineUse use(sim, stream, Engine::kOnDevice, lock);
    if (!use.spend(0, true)) return;
    std::vector<void*> pointers;
    for (auto& parameter : parameters) pointers.push_back(parameter.data());
    KernelAccess access(sim, stream);
    lock.unlock();
    const bool is_done = run_kernel(function.name, grid, block, pointers.data(), access);
    lock.lock();
    access.note(operation);
    if (is_done && access.refused().empty()) return;
    sim.convictions.add("kernel_out_of_bounds",
                        function.name + ", " + operation.label.text() + ": " + access.refused());
    stream.device->sticky = kErrorIllegalAddress;
    sim.changed.notify_all();
  }
};

}  // namespace

extern "C" {

Result cuModuleLoadData(Module* module, const void* image) {
  KVX_SIM_ENTER(call)
  if (module == nullptr || image == nullptr) return kErrorInvalidValue;
  const uint64_t number = call->modules.next_number++;
  call->modules.loaded.insert(number);
  *module = handle_of<Module>(number);
  return kSuccess;
}

Result cuModuleUnload(Module module) {
  KVX_SIM_ENTER(call)
  if (call->modules.loaded.erase(number_of(module)) == 0) return kErrorInvalidHandle;
  std::erase_if(call->modules.functions,
                [module](const auto& entry) { return entry.second.module == number_of(module); });
  return kSuccess;
}

Result cuModuleGetFunction(Function* function, Module module, const char* name) {
  KVX_SIM_ENTER(call)
  if (function == nullptr || name == nullptr) return kErrorInvalidValue;
  if (!call->modules.loaded.contains(number_of(module))) return kErrorInvalidHandle;
  std::vector<size_t> bytes = kernel_parameter_bytes(name);
  if (bytes.empty()) return kErrorNotFound;
  const uint64_t number = call->modules.next_number++;
  call->modules.functions[number] = KernelFunction{number_of(module), name, std::move(bytes)};
  *function = handle_of<Function>(number);
  return kSuccess;
}

Result cuLaunchKernel(Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                      unsigned block_x, unsigned block_y, unsigned block_z,
                      unsigned /*shared_bytes*/, Stream stream, void** parameters, void** extra) {
  KVX_SIM_ENTER(call)
  const auto found = call->modules.functions.find(number_of(function));
  const auto on = call->streams.find(call, stream);
  if (found == call->modules.functions.end() || on == nullptr) return kErrorInvalidHandle;
  constexpr uint64_t kThreadsMax = 1024;
  const uint64_t threads = uint64_t{block_x} * block_y * block_z;
  const bool is_sound = grid_x > 0 && grid_y > 0 && grid_z > 0 && threads > 0 &&
                        threads <= kThreadsMax && parameters != nullptr && extra == nullptr;
  if (!is_sound) return kErrorInvalidValue;
  auto launch = std::make_shared<Launch>();
  launch->function = found->second;
  launch->grid = {grid_x, grid_y, grid_z};
  launch->block = {block_x, block_y, block_z};
  for (size_t i = 0; i < found->second.parameter_bytes.size(); ++i) {
    const auto* bytes = static_cast<const uint8_t*>(parameters[i]);
    launch->parameters.emplace_back(bytes, bytes + found->second.parameter_bytes[i]);
  }
  ++call->counters.launches;
  Simulation& sim = *call.operator->();
  Operation operation;
  operation.label.symbol = call.symbol();
  operation.is_kernel = true;
  operation.run = [&sim, launch](auto& lock, StreamState& running, const Operation& op) {
    launch->run(sim, lock, running, op);
  };
  sim.streams.enqueue(sim, *on, std::move(operation));
  return kSuccess;
}

}  // extern "C"

}  // namespace kvx::sim
