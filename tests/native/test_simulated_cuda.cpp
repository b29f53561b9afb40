// The simulated driver with kernels of this test: launches, and a storm of sound work on many
// streams and threads that must end with the right bytes and without a conviction. The sanitizers
// see the driver here; what it convicts of is tested in tests/sim.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "check.h"
#include "control.h"
#include "entry_points.h"
#include "kernels.h"

namespace kvx::sim {

// copy_bytes(target, source, bytes): one byte a thread.
std::vector<size_t> kernel_parameter_bytes(std::string_view name) {
  if (name != "copy_bytes") return {};
  return {sizeof(uint64_t), sizeof(uint64_t), sizeof(uint32_t)};
}

bool run_kernel(std::string_view /*name*/, Dim3 grid, Dim3 block, void** parameters,
                MemoryAccess& access) {
  const uint64_t target = *static_cast<uint64_t*>(parameters[0]);
  const uint64_t source = *static_cast<uint64_t*>(parameters[1]);
  const uint32_t bytes = *static_cast<uint32_t*>(parameters[2]);
  for (uint32_t i = 0; i < grid.x * block.x && i < bytes; ++i) {
    const uint8_t* from = access.resolve(source + i, 1, false);
    uint8_t* to = access.resolve(target + i, 1, true);
    if (from == nullptr || to == nullptr) return false;
    *to = *from;
  }
  return true;
}

namespace {

constexpr size_t kBlockBytes = 4096;

std::string last_conviction() {
  const uint64_t count = kvxsim_convictions_count();
  if (count == 0) return "";
  char text[512];
  CHECK(kvxsim_conviction(count - 1, text, sizeof text) > 0);
  return text;
}

#define CHECK_CUDA(call) CHECK((call) == kSuccess)
#define CHECK_INNOCENT()                                       \
  do {                                                         \
    if (kvxsim_convictions_count() != 0) {                     \
      std::fprintf(stderr, "%s\n", last_conviction().c_str()); \
      std::abort();                                            \
    }                                                          \
  } while (false)

Context use_device() {
  CHECK_CUDA(cuInit(0));
  Context context = nullptr;
  CHECK_CUDA(cuDevicePrimaryCtxRetain(&context, 0));
  CHECK_CUDA(cuCtxSetCurrent(context));
  return context;
}

DevicePointer allocate(size_t bytes) {
  DevicePointer pointer = 0;
  CHECK_CUDA(cuMemAlloc(&pointer, bytes));
  return pointer;
}

Stream create_stream() {
  Stream stream = nullptr;
  CHECK_CUDA(cuStreamCreateWithPriority(&stream, kStreamNonBlocking, 0));
  return stream;
}

Function load_kernel() {
  Module module = nullptr;
  Function function = nullptr;
  CHECK_CUDA(cuModuleLoadData(&module, "image"));
  CHECK(cuModuleGetFunction(&function, module, "no_such_kernel") == kErrorNotFound);
  CHECK_CUDA(cuModuleGetFunction(&function, module, "copy_bytes"));
  return function;
}

Result launch(Function function, DevicePointer target, DevicePointer source, uint32_t bytes,
              Stream stream) {
  void* parameters[] = {&target, &source, &bytes};
  return cuLaunchKernel(function, (bytes + 255) / 256, 1, 1, 256, 1, 1, 0, stream, parameters,
                        nullptr);
}

void test_kernel_runs_in_stream_order() {
  kvxsim_reset();
  use_device();
  const Function function = load_kernel();
  const Stream stream = create_stream();
  const DevicePointer source = allocate(kBlockBytes);
  const DevicePointer target = allocate(kBlockBytes);
  // The parameters are the launch's own: launch() has returned long before this is thawed.
  kvxsim_freeze(kKvxsimOnDevice, 1);
  CHECK_CUDA(cuMemsetD8Async(source, 0x5A, kBlockBytes, stream));
  CHECK_CUDA(launch(function, target, source, kBlockBytes, stream));
  CHECK(cuStreamQuery(stream) == kErrorNotReady);
  kvxsim_freeze(kKvxsimOnDevice, 0);
  CHECK_CUDA(cuStreamSynchronize(stream));
  std::vector<uint8_t> seen(kBlockBytes);
  CHECK(kvxsim_copy_from_device(seen.data(), target, kBlockBytes) == 0);
  CHECK(seen == std::vector<uint8_t>(kBlockBytes, 0x5A));
  CHECK(kvxsim_count("launches") == 1);
  CHECK_INNOCENT();
}

void test_kernel_out_of_bounds_is_sticky() {
  kvxsim_reset();
  use_device();
  const Function function = load_kernel();
  const Stream stream = create_stream();
  const DevicePointer memory = allocate(kBlockBytes);
  CHECK_CUDA(launch(function, memory, memory + 1, kBlockBytes, stream));
  CHECK(cuStreamSynchronize(stream) == kErrorIllegalAddress);
  CHECK(cuMemFree(memory) == kErrorIllegalAddress);
  CHECK(last_conviction().starts_with("kernel_out_of_bounds: copy_bytes"));
  // A context is as new when the last who held it has let go.
  CHECK_CUDA(cuDevicePrimaryCtxRelease(0));
  use_device();
  CHECK_CUDA(cuMemFree(memory));
}

void test_kernel_races() {
  for (const bool has_wait : {true, false}) {
    kvxsim_reset();
    use_device();
    const Function function = load_kernel();
    const Stream first = create_stream();
    const Stream second = create_stream();
    const DevicePointer memory = allocate(2 * kBlockBytes);
    Event event = nullptr;
    CHECK_CUDA(cuEventCreate(&event, kEventDisableTiming));
    CHECK_CUDA(cuMemsetD8Async(memory, 1, kBlockBytes, first));
    CHECK_CUDA(cuEventRecord(event, first));
    if (has_wait) CHECK_CUDA(cuStreamWaitEvent(second, event, 0));
    CHECK_CUDA(launch(function, memory + kBlockBytes, memory, kBlockBytes, second));
    CHECK_CUDA(cuStreamSynchronize(first));
    CHECK_CUDA(cuStreamSynchronize(second));
    CHECK(last_conviction().starts_with("race: ") == !has_wait);
  }
}

// One tenant of the storm: its own slots of shared memory, two streams, everything ordered.
class Tenant {
 public:
  Tenant(Context context, DevicePointer device, uint8_t* host, Function function, uint64_t seed)
      : device_(device), host_(host), function_(function), random_(seed) {
    CHECK_CUDA(cuCtxSetCurrent(context));
    offload_ = create_stream();
    onboard_ = create_stream();
    CHECK_CUDA(cuEventCreate(&event_, kEventDisableTiming | kEventBlockingSync));
  }

  ~Tenant() {
    CHECK_CUDA(cuEventDestroy(event_));
    CHECK_CUDA(cuStreamDestroy(offload_));
    CHECK_CUDA(cuStreamDestroy(onboard_));
  }

  // Host to device, a kernel on the device, back to the host: the bytes must survive.
  void round() {
    const uint8_t value = static_cast<uint8_t>(random_());
    kvxsim_host_access(host_, kBytes, 1);
    std::memset(host_, value, kBytes);
    copy_blocks(device_, address_of(host_), kSourceOrderAny, onboard_);
    CHECK_CUDA(launch(function_, device_ + kBytes, device_, kBytes, onboard_));
    CHECK_CUDA(cuEventRecord(event_, onboard_));
    CHECK_CUDA(cuStreamWaitEvent(offload_, event_, 0));
    copy_blocks(address_of(host_ + kBytes), device_ + kBytes, kSourceOrderStream, offload_);
    CHECK_CUDA(cuEventRecord(event_, offload_));
    wait();
    kvxsim_host_access(host_ + kBytes, kBytes, 0);
    CHECK(std::memcmp(host_, host_ + kBytes, kBytes) == 0);
  }

  static constexpr size_t kBlocks = 4;
  static constexpr uint32_t kBytes = kBlocks * kBlockBytes;

 private:
  static DevicePointer address_of(const void* host) {
    return reinterpret_cast<DevicePointer>(host);
  }

  void copy_blocks(DevicePointer target, DevicePointer source, int order, Stream stream) {
    DevicePointer targets[kBlocks];
    DevicePointer sources[kBlocks];
    size_t bytes[kBlocks];
    for (size_t i = 0; i < kBlocks; ++i) {
      targets[i] = target + i * kBlockBytes;
      sources[i] = source + i * kBlockBytes;
      bytes[i] = kBlockBytes;
    }
    MemcpyAttributes attributes;
    attributes.source_access_order = order;
    size_t start = 0;
    CHECK_CUDA(cuMemcpyBatchAsync(targets, sources, bytes, kBlocks, &attributes, &start, 1, nullptr,
                                  stream));
  }

  void wait() {
    switch (random_() % 3) {
      case 0:
        CHECK_CUDA(cuEventSynchronize(event_));
        break;
      case 1:
        CHECK_CUDA(cuStreamSynchronize(offload_));
        break;
      default:
        while (cuEventQuery(event_) == kErrorNotReady) {
          std::this_thread::sleep_for(std::chrono::microseconds(100));
        }
    }
  }

  DevicePointer device_;
  uint8_t* host_;
  Function function_;
  std::mt19937_64 random_;
  Stream offload_ = nullptr;
  Stream onboard_ = nullptr;
  Event event_ = nullptr;
};

void test_storm(uint64_t seed) {
  constexpr size_t kTenants = 4;
  constexpr size_t kTenantBytes = 2 * Tenant::kBytes;
  constexpr int kRounds = 25;
  kvxsim_reset();
  kvxsim_set_shuffle_seed(seed);
  const Context context = use_device();
  const Function function = load_kernel();
  const DevicePointer device = allocate(kTenants * kTenantBytes);
  auto* host = static_cast<uint8_t*>(std::aligned_alloc(kBlockBytes, kTenants * kTenantBytes));
  CHECK_CUDA(cuMemHostRegister(host, kTenants * kTenantBytes, kHostRegisterPortable));
  std::vector<std::thread> threads;
  for (size_t i = 0; i < kTenants; ++i) {
    threads.emplace_back([=] {
      const size_t at = i * kTenantBytes;
      Tenant tenant(context, device + at, host + at, function, seed + i);
      for (int round = 0; round < kRounds; ++round) tenant.round();
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_CUDA(cuMemHostUnregister(host));
  CHECK_CUDA(cuMemFree(device));
  std::free(host);
  CHECK(kvxsim_count("live_streams") == 0);
  CHECK(kvxsim_count("launches") == kTenants * kRounds);
  CHECK_INNOCENT();
}

}  // namespace

}  // namespace kvx::sim

int main() {
  kvx::sim::test_kernel_runs_in_stream_order();
  kvx::sim::test_kernel_out_of_bounds_is_sticky();
  kvx::sim::test_kernel_races();
  const uint64_t seed = std::random_device()();
  std::printf("simulated cuda: seed %llu\n", static_cast<unsigned long long>(seed));
  kvx::sim::test_storm(seed);
  kvx::sim::test_storm(seed + 1);
  kvxsim_reset();
  std::puts("simulated cuda: ok");
  return 0;
}
