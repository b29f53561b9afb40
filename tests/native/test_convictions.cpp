// The simulated driver is worth what it finds: kvx makes each of its mistakes on purpose here, and
// is convicted of it; without the mistake the same work is done with nothing held against it.
#include <array>
#include <cstring>
#include <string>
#include <thread>

#include "device_simulation.h"
#include "kvx/engine.h"
#include "shim/sabotage.h"

namespace kvx::test {

namespace {

constexpr double kLongS = 30.0;
constexpr auto kPause = std::chrono::milliseconds(1);
constexpr uint64_t kSeeds = 5;
// Apart on both sides, so that nothing is merged and a batch has an order to shuffle.
constexpr size_t kRuns = 8;
constexpr size_t kRunBytes = 1024;
constexpr size_t kStride = 4096;
constexpr size_t kBytes = kRuns * kStride;

// Kernels depend on the compilers of the machine; what is convicted must not.
constexpr CopyOptions kNoKernels{.sm = SmUse::kNever};

// A thread of kvx that is still at it, or the driver: what is waited for here is sure to come.
void wait_until(const std::function<bool()>& is_so) {
  for (int i = 0; i < 10'000; ++i) {
    if (is_so()) return;
    std::this_thread::sleep_for(kPause);
  }
  CHECK(!"waited in vain");
}

// What operations touch is noted when they begin to run. The host learns nothing by these two.
void wait_until_copying() {
  wait_until([] { return simulated_count("tracked_accesses") > 0; });
}
void wait_until_copied(const char* direction, int64_t bytes) {
  wait_until([=] { return simulated_count(direction) == bytes; });
}

// What the first conviction is of; empty: there is none.
std::string convicted_kind() {
  std::array<char, 500> text{};
  if (KVX_SIMULATED(kvxsim_conviction)(0, text.data(), text.size()) < 0) return {};
  return std::string(text.data(), std::strcspn(text.data(), ":"));
}

// A device with copies on it. Nothing of either may be left when it goes: the next scenario starts
// with a simulation set back, which no thread may race with.
struct World {
  World() {
    CHECK_OK(device->pin(host->data(), host->bytes(), &pinned));
    CHECK_OK(device->make_copies(kNoKernels, completions.sink(), &copies));
  }
  ~World() {
    if (copies != nullptr) (void)copies->close(kLongS);
    copies.reset();
    pinned.reset();
    memory.reset();
    // Abandoned copies keep the device until they have ended.
    wait_until([this] { return device.use_count() == 1; });
  }

  CopyRequest request(CopyDirection direction) const {
    CopyRequest made;
    made.direction = direction;
    for (size_t i = 0; i < kRuns; ++i) {
      const uint64_t on_host = address_of(host->data()) + i * kStride;
      const uint64_t on_device = memory->address() + (kRuns - 1 - i) * kStride;
      const bool is_to_device = direction == CopyDirection::kHostToDevice;
      made.runs.add(is_to_device ? on_device : on_host, is_to_device ? on_host : on_device,
                    kRunBytes);
    }
    return made;
  }
  void note_host(bool is_write) const {
    device->note_host_access(host->data(), host->bytes(), is_write);
  }

  std::shared_ptr<CudaDevice> device = open_simulated();
  std::unique_ptr<HostRegion> host = host_memory(kBytes);
  std::unique_ptr<DeviceMemory> memory = device_memory(*device, kBytes);
  std::unique_ptr<PinnedRange> pinned;
  Completions completions;
  std::unique_ptr<CopyBackend> copies;
};

// Copies that are to begin after somebody else's work, which takes its time.
void copy_after(CopyDirection direction) {
  World world;
  uint64_t stream = 0;
  CHECK_OK(world.device->create_stream(&stream));
  const bool is_to_device = direction == CopyDirection::kHostToDevice;
  if (is_to_device) {
    // As a second tier would: the bytes come into host memory on a stream that is not ours.
    KVX_SIMULATED(kvxsim_set_latency)(kKvxsimDeviceToHost, 3'000'000);
    const ContextScope scope(world.device->context());
    CHECK(world.device->api().memcpy_async(address_of(world.host->data()), world.memory->address(),
                                           kBytes, reinterpret_cast<cuda::Stream>(stream)) == 0);
  } else {
    KVX_SIMULATED(kvxsim_set_latency)(kKvxsimOnDevice, 3'000'000);
    CHECK_OK(world.device->fill(world.memory->address(), 7, kBytes, stream));
  }
  CopyRequest request = world.request(direction);
  CHECK_OK(world.device->mark(stream, &request.after));
  world.copies->submit(std::move(request));
  CHECK(world.completions.wait(0).code == Code::kOk);
  CHECK_OK(world.device->synchronize_stream(stream));
  CHECK_OK(world.device->destroy_stream(stream));
}
void offload_after_forward_pass() { copy_after(CopyDirection::kDeviceToHost); }
void onboard_after_arrival() { copy_after(CopyDirection::kHostToDevice); }

void copy_there_and_back() {
  World world;
  for (const CopyDirection direction :
       {CopyDirection::kHostToDevice, CopyDirection::kDeviceToHost}) {
    CopyRequest request = world.request(direction);
    request.token = static_cast<uint64_t>(direction);
    world.copies->submit(std::move(request));
    CHECK(world.completions.wait(static_cast<uint64_t>(direction)).code == Code::kOk);
  }
}

void read_what_has_arrived() {
  World world;
  KVX_SIMULATED(kvxsim_set_latency)(kKvxsimDeviceToHost, 2'000'000);
  world.copies->submit(world.request(CopyDirection::kDeviceToHost));
  CHECK(world.completions.wait(0).code == Code::kOk);
  world.note_host(/*is_write=*/false);
  wait_until_copied("bytes_d2h", kRuns * kRunBytes);
}

void overwrite_what_was_sent() {
  World world;
  KVX_SIMULATED(kvxsim_set_latency)(kKvxsimHostToDevice, 2'000'000);
  world.copies->submit(world.request(CopyDirection::kHostToDevice));
  CHECK(world.completions.wait(0).code == Code::kOk);
  world.note_host(/*is_write=*/true);
  wait_until_copied("bytes_h2d", kRuns * kRunBytes);
}

void free_what_was_copied() {
  World world;
  KVX_SIMULATED(kvxsim_set_latency)(kKvxsimDeviceToHost, 2'000'000);
  world.copies->submit(world.request(CopyDirection::kDeviceToHost));
  CHECK(world.completions.wait(0).code == Code::kOk);
  world.memory.reset();
}

// Frees memory that a frozen engine may still copy: the driver waits, so the engine goes on once
// the driver has said what it thinks of it.
void free_and_thaw(std::unique_ptr<DeviceMemory>* memory, int engine) {
  std::thread thawing([engine] {
    wait_until([] { return KVX_SIMULATED(kvxsim_convictions_count)() > 0; });
    KVX_SIMULATED(kvxsim_freeze)(engine, 0);
  });
  memory->reset();
  thawing.join();
}

// A device that stands still when its copies are closed. What was abandoned keeps its memory.
void close_on_a_frozen_device() {
  World world;
  KVX_SIMULATED(kvxsim_freeze)(kKvxsimDeviceToHost, 1);
  world.copies->submit(world.request(CopyDirection::kDeviceToHost));
  wait_until_copying();
  if (world.copies->close(0.0) == 0) {
    free_and_thaw(&world.memory, kKvxsimDeviceToHost);
    return;
  }
  KVX_SIMULATED(kvxsim_freeze)(kKvxsimDeviceToHost, 0);
  // Their own threads see them end; streams go with the last of those.
  world.copies.reset();
  wait_until([] { return simulated_count("live_streams") == 0; });
}

// An engine that offloads blocks of one plane into slots.
struct EngineWorld {
  static constexpr int64_t kBlocks = 4;
  static constexpr int64_t kBlock = 4096;

  EngineWorld() {
    EngineOptions options;
    options.copy_threads = 1;
    options.backend_options.failpoints = failpoints;
    CHECK_OK(Engine::create(options, &engine));
    CHECK_OK(engine->attach_device(device, kNoKernels));
    CHECK_OK(device->pin(slots->data(), slots->bytes(), &pinned));
  }
  ~EngineWorld() { CHECK(engine->close(kLongS).abandoned_jobs == 0); }

  std::shared_ptr<Job> offload() const {
    Batch batch;
    batch.kind = JobKind::kCopyIn;
    batch.block_bytes = kBlock;
    batch.io_bytes = kBlock;
    const Plane plane{reinterpret_cast<uint8_t*>(paged->address()), kBlock, kBlock};
    batch.planes = PlaneSet(std::span(&plane, 1));
    batch.is_on_device = true;
    for (int64_t block = 0; block < kBlocks; ++block) {
      batch.ids.push_back(block);
      batch.addresses.push_back(reinterpret_cast<int64_t>(slots->data() + block * kBlock));
    }
    batch.keys.assign(kBlocks * 16, 7);
    std::shared_ptr<Job> job;
    CHECK_OK(engine->submit(std::move(batch), kLongS, &job));
    return job;
  }
  // A job that has ended while its copies stand still in the driver.
  std::shared_ptr<Job> offload_and_cancel() const {
    KVX_SIMULATED(kvxsim_freeze)(kKvxsimDeviceToHost, 1);
    auto job = offload();
    wait_until_copying();
    CHECK(job->cancel());
    return job;
  }

  std::shared_ptr<CudaDevice> device = open_simulated();
  std::unique_ptr<HostRegion> slots = host_memory(kBlocks * kBlock);
  std::unique_ptr<DeviceMemory> paged = device_memory(*device, kBlocks* kBlock);
  std::unique_ptr<PinnedRange> pinned;
  std::shared_ptr<Failpoints> failpoints = std::make_shared<Failpoints>();
  std::unique_ptr<Engine> engine;
};

// The engine itself reads what arrived, for the checksums. It does so here when the bytes are
// there, though nobody told it: a race that does no harm, or ThreadSanitizer would find it as well.
void checksum_offloaded_slots() {
  const EngineWorld world;
  CHECK_OK(world.failpoints->set({.target = FaultTarget::kCopy, .action = FaultAction::kHang}));
  const auto job = world.offload();
  wait_until_copied("bytes_d2h", EngineWorld::kBlocks * EngineWorld::kBlock);
  world.failpoints->clear();
  CHECK(job->wait_quiesced(kLongS) && job->state() == JobState::kDone);
}

void reuse_the_slots_of_a_cancelled_job() {
  const EngineWorld world;
  const auto job = world.offload_and_cancel();
  if (job->is_quiesced()) {
    world.device->note_host_access(world.slots->data(), world.slots->bytes(), true);
  }
  KVX_SIMULATED(kvxsim_freeze)(kKvxsimDeviceToHost, 0);
  CHECK(job->wait_quiesced(kLongS));
  world.device->note_host_access(world.slots->data(), world.slots->bytes(), true);
}

void free_the_cache_of_a_cancelled_job() {
  EngineWorld world;
  const auto job = world.offload_and_cancel();
  if (job->is_quiesced()) return free_and_thaw(&world.paged, kKvxsimDeviceToHost);
  KVX_SIMULATED(kvxsim_freeze)(kKvxsimDeviceToHost, 0);
  CHECK(job->wait_quiesced(kLongS));
  world.paged.reset();
}

void free_the_planes_of_a_cancelled_job() {
  EngineWorld world;
  const auto job = world.offload_and_cancel();
  if (job->is_at_rest()) return free_and_thaw(&world.paged, kKvxsimDeviceToHost);
  KVX_SIMULATED(kvxsim_freeze)(kKvxsimDeviceToHost, 0);
  CHECK(job->wait_at_rest(kLongS));
  world.paged.reset();
}

// Every run is a scenario of its own: a simulation set back, and nothing left of it afterwards.
std::string run(uint64_t seed, Mistake made, void (*scenario)()) {
  KVX_SIMULATED(kvxsim_reset)();
  KVX_SIMULATED(kvxsim_set_shuffle_seed)(seed);
  mistake().store(made);
  scenario();
  mistake().store(Mistake::kNone);
  CHECK(live_objects() == 0);
  return convicted_kind();
}

// One mistake may lead to others (memory is freed when the scenario ends, whatever is in flight):
// the first conviction is to be that of the mistake itself.
void convict(const char* name, Mistake made, const std::string& kind, void (*scenario)()) {
  std::fprintf(stderr, "%s\n", name);
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    const std::string correct = run(seed, Mistake::kNone, scenario);
    if (!correct.empty()) (void)convictions();
    CHECK(correct.empty());
    const std::string found = run(seed, made, scenario);
    if (found != kind) {
      std::fprintf(stderr, "seed %d: wanted %s\n", static_cast<int>(seed), kind.c_str());
      (void)convictions();
    }
    CHECK(found == kind);
  }
}
#define CONVICT(mistake, kind, scenario) \
  ::kvx::test::convict(#mistake ", " #scenario, Mistake::mistake, kind, scenario)

void test_convictions() {
  CONVICT(kSkipsEventWait, "race", offload_after_forward_pass);
  CONVICT(kSkipsEventWait, "race", onboard_after_arrival);
  CONVICT(kAnyOrderAfterWait, "race", offload_after_forward_pass);
  CONVICT(kAnyOrderAfterWait, "race", onboard_after_arrival);
  CONVICT(kCompletesEarly, "race", read_what_has_arrived);
  CONVICT(kCompletesEarly, "race", overwrite_what_was_sent);
  CONVICT(kCompletesEarly, "race", checksum_offloaded_slots);
  CONVICT(kCompletesEarly, "free_in_flight", free_what_was_copied);
  CONVICT(kFreesInFlight, "free_in_flight", close_on_a_frozen_device);
  CONVICT(kQuiescesEarly, "free_in_flight", free_the_cache_of_a_cancelled_job);
  CONVICT(kQuiescesEarly, "race", reuse_the_slots_of_a_cancelled_job);
  CONVICT(kRestsEarly, "free_in_flight", free_the_planes_of_a_cancelled_job);
  CONVICT(kUsesNullStream, "null_stream", copy_there_and_back);
}

}  // namespace

}  // namespace kvx::test

int main() {
  kvx::test::test_convictions();
  return 0;
}
