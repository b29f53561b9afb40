// Copies on the simulated driver: every path gives the same bytes, in order with other streams, and
// a driver that stands still or fails is told from one that copies.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "device_simulation.h"

namespace kvx::test {

namespace {

constexpr int64_t kPieceBytes = 64 << 10;
constexpr size_t kFragments = 512;
constexpr size_t kFragmentBytes = 1536;  // does not divide a piece: some cross into the next
constexpr size_t kStride = 2048;

// A device with memory, pinned host memory, and copies.
struct World {
  explicit World(const CopyOptions& options = {}) {
    CHECK_OK(device->pin_in_pieces(host->data(), host->bytes(), kPieceBytes, &range));
    CHECK_OK(device->make_copies(options, completions.sink(), &copies));
  }

  std::shared_ptr<CudaDevice> device = open_simulated();
  std::unique_ptr<DeviceMemory> memory = device_memory(*device, kFragments* kStride);
  std::unique_ptr<HostRegion> host = host_memory(kFragments * kStride);
  std::unique_ptr<PinnedRange> range;
  Completions completions;
  std::unique_ptr<CopyBackend> copies;
};

// Contiguous on the host side, apart on the device side and there in any order.
CopyRequest fragments_of(const World& world, CopyDirection direction, bool is_shuffled,
                         std::mt19937_64& random) {
  std::vector<size_t> order(kFragments);
  std::iota(order.begin(), order.end(), size_t{0});
  if (is_shuffled) std::shuffle(order.begin(), order.end(), random);
  CopyRequest request;
  request.direction = direction;
  for (size_t i = 0; i < kFragments; ++i) {
    const uint64_t host = address_of(world.host->data()) + i * kFragmentBytes;
    const uint64_t on_device = world.memory->address() + order[i] * kStride;
    const bool is_h2d = direction == CopyDirection::kHostToDevice;
    request.runs.add(is_h2d ? on_device : host, is_h2d ? host : on_device, kFragmentBytes);
  }
  return request;
}

CopyCalibration only(CopyMethod method) {
  CopyCalibration calibration;
  for (size_t direction = 0; direction < kCopyDirections; ++direction) {
    calibration.plain_gb_s[direction] = 1000;
    calibration.gb_s[direction][static_cast<size_t>(CopyMethod::kSingle)].fill(0.001);
    calibration.gb_s[direction][static_cast<size_t>(method)].fill(1000);
  }
  return calibration;
}

void write_host(World& world, std::mt19937_64& random) {
  world.device->note_host_access(world.host->data(), world.host->bytes(), true);
  for (int64_t i = 0; i < world.host->bytes(); ++i) {
    world.host->data()[i] = static_cast<uint8_t>(random());
  }
}

void go_there_and_back(CopyMethod method, uint64_t seed) {
  KVX_SIMULATED(kvxsim_reset)();
  KVX_SIMULATED(kvxsim_set_shuffle_seed)(seed);
  std::mt19937_64 random(seed);
  World world({.staging_bytes = 512 << 10, .calibration = only(method)});
  write_host(world, random);
  const std::vector<uint8_t> wanted(world.host->data(),
                                    world.host->data() + kFragments * kFragmentBytes);
  CopyRequest there =
      fragments_of(world, CopyDirection::kHostToDevice, method != CopyMethod::kRows, random);
  CopyRequest back;
  back.direction = CopyDirection::kDeviceToHost;
  back.runs = there.runs;
  std::swap(back.runs.targets, back.runs.sources);
  back.token = 1;
  world.copies->submit(std::move(there));
  CHECK(world.completions.wait(0).code == Code::kOk);
  world.device->note_host_access(world.host->data(), world.host->bytes(), true);
  std::memset(world.host->data(), 0, static_cast<size_t>(world.host->bytes()));
  world.copies->submit(std::move(back));
  CHECK(world.completions.wait(1).code == Code::kOk);
  world.device->note_host_access(world.host->data(), world.host->bytes(), false);
  CHECK(std::memcmp(world.host->data(), wanted.data(), wanted.size()) == 0);
  const CopyStats stats = world.copies->stats();
  const std::string kernels = world.device->info().kernels;
  const bool is_possible =
      method != CopyMethod::kStaged || kernels == "fatbin" || kernels == "nvrtc";
  if (!is_possible) {
    std::fprintf(stderr, "  not staged: %s\n", kernels.c_str());
    CHECK(world.copies->close(5.0) == 0);
    return;
  }
  CHECK(stats.runs_by_method[static_cast<size_t>(method)] >= static_cast<int64_t>(kFragments));
  CHECK((stats.kernels_launched > 0) == (method == CopyMethod::kStaged));
  CHECK(stats.pageable_bytes == 0 && simulated_count("pageable_copies") == 0);
  CHECK(world.copies->close(5.0) == 0);
}

void test_every_method_gives_the_same_bytes() {
  for (const CopyMethod method :
       {CopyMethod::kBatch, CopyMethod::kRows, CopyMethod::kSingle, CopyMethod::kStaged}) {
    for (const uint64_t seed : {1, 2, 3}) {
      std::fprintf(stderr, "  %s, seed %d\n", std::string(copy_method_name(method)).c_str(),
                   static_cast<int>(seed));
      go_there_and_back(method, seed);
      CHECK(convictions() == 0);
      CHECK(live_objects() == 0);
    }
  }
}

void test_without_batches() {
  KVX_SIMULATED(kvxsim_set_has_batch_copy)(0);
  std::mt19937_64 random(4);
  World world;
  write_host(world, random);
  world.copies->submit(fragments_of(world, CopyDirection::kHostToDevice, true, random));
  CHECK(world.completions.wait(0).code == Code::kOk);
  CHECK(simulated_count("batch_calls") == 0);
  CHECK(world.copies->close(5.0) == 0);
}

void test_no_kernel_without_leave() {
  std::mt19937_64 random(5);
  World world({.sm = SmUse::kNever, .calibration = only(CopyMethod::kStaged)});
  CHECK(world.device->info().kernels == "not asked for");
  write_host(world, random);
  world.copies->submit(fragments_of(world, CopyDirection::kHostToDevice, true, random));
  CHECK(world.completions.wait(0).code == Code::kOk);
  CHECK(simulated_count("launches") == 0);
  CHECK(world.copies->close(5.0) == 0);
}

// Work of somebody else's stream comes before what carries its mark, in both directions and by
// every method.
void order_after_marks(CopyMethod method) {
  KVX_SIMULATED(kvxsim_reset)();
  KVX_SIMULATED(kvxsim_set_latency)(kKvxsimOnDevice, 5'000'000);
  std::mt19937_64 random(6);
  World world({.staging_bytes = 512 << 10, .calibration = only(method)});
  uint64_t stream = 0;
  CHECK_OK(world.device->create_stream(&stream));
  std::shared_ptr<StreamMark> mark;
  CHECK(world.device->mark(0, &mark).code() == Code::kUsage);
  const auto bytes = world.memory->bytes();
  CHECK_OK(world.device->fill(world.memory->address(), 77, bytes, stream));
  CHECK_OK(world.device->mark(stream, &mark));
  CopyRequest request =
      fragments_of(world, CopyDirection::kDeviceToHost, method != CopyMethod::kRows, random);
  request.after = mark;
  world.copies->submit(std::move(request));
  CHECK(world.completions.wait(0).code == Code::kOk);
  world.device->note_host_access(world.host->data(), world.host->bytes(), false);
  CHECK(world.host->data()[0] == 77 && world.host->data()[kFragments * kFragmentBytes - 1] == 77);
  CHECK_OK(world.device->fill(world.memory->address(), 78, bytes, stream));
  CHECK_OK(world.device->mark(stream, &mark));
  request = fragments_of(world, CopyDirection::kHostToDevice, method != CopyMethod::kRows, random);
  request.after = mark;
  request.token = 1;
  world.copies->submit(std::move(request));
  CHECK(world.completions.wait(1).code == Code::kOk);
  uint8_t seen = 0;
  CHECK(KVX_SIMULATED(kvxsim_copy_from_device)(&seen, world.memory->address(), 1) == 0);
  CHECK(seen == 77);
  CHECK_OK(world.device->synchronize_stream(stream));
  CHECK_OK(world.device->destroy_stream(stream));
  CHECK(world.copies->close(5.0) == 0);
}

void test_marks_order_copies() {
  for (const CopyMethod method :
       {CopyMethod::kBatch, CopyMethod::kRows, CopyMethod::kSingle, CopyMethod::kStaged}) {
    order_after_marks(method);
    CHECK(convictions() == 0);
  }
}

void test_requests_complete_in_groups() {
  World world({.calibration = only(CopyMethod::kBatch)});
  KVX_SIMULATED(kvxsim_set_latency)(kKvxsimHostToDevice, 2'000'000);
  constexpr uint64_t kRequests = 500;
  for (uint64_t token = 0; token < kRequests; ++token) {
    world.copies->submit(one_run(CopyDirection::kHostToDevice,
                                 world.memory->address() + token * kStride,
                                 address_of(world.host->data()) + token * kStride, 1024, token));
  }
  for (uint64_t token = 0; token < kRequests; ++token) {
    CHECK(world.completions.wait(token).code == Code::kOk);
  }
  const CopyStats stats = world.copies->stats();
  const int64_t calls =
      std::accumulate(stats.calls_by_method.begin(), stats.calls_by_method.end(), int64_t{0});
  CHECK(calls < static_cast<int64_t>(kRequests) / 4);
  CHECK(world.copies->close(5.0) == 0);
}

void test_a_frozen_engine_is_abandoned() {
  const std::array<int, 3> engines = {kKvxsimHostToDevice, kKvxsimDeviceToHost, kKvxsimOnDevice};
  for (const int engine : engines) {
    KVX_SIMULATED(kvxsim_reset)();
    auto world = std::make_unique<World>();
    const auto second = device_memory(*world->device, kFragments * kStride);
    KVX_SIMULATED(kvxsim_freeze)(engine, 1);
    const uint64_t device = world->memory->address();
    const uint64_t host = address_of(world->host->data());
    const std::array<uint64_t, 3> targets = {device, host, second->address()};
    const std::array<uint64_t, 3> sources = {host, device, device};
    const auto at = static_cast<size_t>(engine);
    // Each waits for the one before it, so the lane holds as many groups as it may.
    for (uint64_t token = 0; token < 40; ++token) {
      world->copies->submit(one_run(static_cast<CopyDirection>(engine), targets[at] + token * 4096,
                                    sources[at] + token * 4096, 4096, token));
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    const auto begin = std::chrono::steady_clock::now();
    const int64_t abandoned = world->copies->close(0.2);
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(5));
    CHECK(abandoned > 0 && abandoned < 40);
    int64_t cancelled = 0;
    for (uint64_t token = 0; token < 40; ++token) {
      if (world->completions.has(token)) {
        CHECK(world->completions.wait(token).code == Code::kCancelled);
        ++cancelled;
      }
    }
    CHECK(cancelled + abandoned == 40);
    KVX_SIMULATED(kvxsim_freeze)(engine, 0);
    world->copies.reset();
    // What was left behind ends by itself now, and gives everything back.
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    CHECK(convictions() == 0);
  }
}

void end_the_device() {
  World world;
  KVX_SIMULATED(kvxsim_freeze)(kKvxsimHostToDevice, 1);
  world.copies->submit(one_run(CopyDirection::kHostToDevice, world.memory->address(),
                               address_of(world.host->data()), 4096, 0));
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  KVX_SIMULATED(kvxsim_fail_context)(0, cuda::kErrorIllegalAddress);
  const CopyCompletion ended = world.completions.wait(0);
  CHECK(ended.code == Code::kDevice && ended.driver_error == cuda::kErrorIllegalAddress);
  CHECK(world.device->health().code() == Code::kDevice);
  CHECK(world.device->health().error_number() == cuda::kErrorIllegalAddress);
  for (uint64_t token = 1; token < 10; ++token) {
    world.copies->submit(one_run(static_cast<CopyDirection>(token % 3), world.memory->address(),
                                 address_of(world.host->data()), 4096, token));
    CHECK(world.completions.wait(token).code == Code::kDevice);
  }
  CHECK(world.copies->close(5.0) == 0);
}

void test_a_sticky_error_ends_the_device() {
  end_the_device();
  CHECK(convictions() == 0);
  // A real context takes everything in it along; the simulation leaves it to be counted.
  KVX_SIMULATED(kvxsim_reset)();
}

// The driver refuses the third of many copies: what it took before must have ended.
void test_half_a_group_is_waited_for() {
  std::mt19937_64 random(8);
  World world({.calibration = only(CopyMethod::kSingle)});
  write_host(world, random);
  KVX_SIMULATED(kvxsim_set_latency)(kKvxsimHostToDevice, 20'000'000);
  KVX_SIMULATED(kvxsim_inject)("cuMemcpyAsync", 3, cuda::kErrorUnknown, 0);
  world.copies->submit(fragments_of(world, CopyDirection::kHostToDevice, true, random));
  const CopyCompletion failed = world.completions.wait(0);
  CHECK(failed.code == Code::kDevice && failed.driver_error == cuda::kErrorUnknown);
  // Convicted as a race if one of the two copies is still reading.
  write_host(world, random);
  CHECK_OK(world.device->health());
  world.copies->submit([&] {
    CopyRequest request = fragments_of(world, CopyDirection::kHostToDevice, true, random);
    request.runs.targets.resize(2);
    request.runs.sources.resize(2);
    request.runs.bytes.resize(2);
    request.token = 1;
    return request;
  }());
  CHECK(world.completions.wait(1).code == Code::kOk);
  CHECK(world.copies->close(5.0) == 0);
}

}  // namespace

}  // namespace kvx::test

int main() {
  using namespace kvx::test;
  RUN_ON_SIMULATION(test_every_method_gives_the_same_bytes);
  RUN_ON_SIMULATION(test_without_batches);
  RUN_ON_SIMULATION(test_no_kernel_without_leave);
  RUN_ON_SIMULATION(test_marks_order_copies);
  RUN_ON_SIMULATION(test_requests_complete_in_groups);
  RUN_ON_SIMULATION(test_a_frozen_engine_is_abandoned);
  RUN_ON_SIMULATION(test_a_sticky_error_ends_the_device);
  RUN_ON_SIMULATION(test_half_a_group_is_waited_for);
  return 0;
}
