// The engine's jobs with device memory, on the emulated device and on the simulated driver: what
// arrives, what never is sent, and what a device that stands still or fails does to them.
#include <cstring>
#include <thread>

#include "device_simulation.h"
#include "kvx/checksum.h"
#include "kvx/engine.h"

namespace kvx::test {

namespace {

constexpr int64_t kBlocks = 24;
constexpr int64_t kLayers = 4;
constexpr int64_t kPlaneBytes = 8192;
constexpr int64_t kBlock = 2 * kLayers * kPlaneBytes;
constexpr double kLongS = 30.0;

// An engine with a device, host slots, HBM slots, and a layer-first paged cache on the device.
struct World {
  explicit World(std::shared_ptr<Device> opened) : device(std::move(opened)) {
    CHECK_OK(Engine::create({.copy_threads = 2}, &engine));
    CHECK_OK(engine->attach_device(device, {.staging_bytes = 1 << 20}));
    slots = host_memory(kBlocks * kBlock);
    CHECK_OK(device->pin(slots->data(), slots->bytes(), &pinned));
    paged = device_memory(*device, kBlocks * kBlock);
    stored = device_memory(*device, kBlocks * kBlock);
  }
  ~World() {
    const CloseReport report = engine->close(5.0);
    CHECK(report.abandoned_jobs == 0);
  }

  bool is_simulated() const { return !device->info().is_emulated; }

  void write(uint64_t target, const std::vector<uint8_t>& bytes) const {
    if (is_simulated()) {
      CHECK(KVX_SIMULATED(kvxsim_copy_to_device)(target, bytes.data(), bytes.size()) == 0);
    } else {
      std::memcpy(reinterpret_cast<void*>(target), bytes.data(), bytes.size());
    }
  }

  std::vector<uint8_t> read(uint64_t source, int64_t bytes) const {
    std::vector<uint8_t> result(static_cast<size_t>(bytes));
    if (is_simulated()) {
      CHECK(KVX_SIMULATED(kvxsim_copy_from_device)(result.data(), source, result.size()) == 0);
    } else {
      std::memcpy(result.data(), reinterpret_cast<void*>(source), result.size());
    }
    return result;
  }

  // Plane p of block b; each plane holds all blocks, as a layer-first engine has it.
  PlaneSet planes(bool merges = true) const {
    std::vector<Plane> made;
    for (int64_t p = 0; p < 2 * kLayers; ++p) {
      auto* base = reinterpret_cast<uint8_t*>(paged->address()) + p * kBlocks * kPlaneBytes;
      made.push_back({base, kPlaneBytes, kPlaneBytes});
    }
    return PlaneSet(made, merges);
  }

  static uint8_t value(int64_t block, int64_t plane, int64_t at) {
    return static_cast<uint8_t>(block * 31 + plane * 7 + at * 3 + at / 256);
  }
  void fill_paged() const {
    std::vector<uint8_t> bytes(static_cast<size_t>(kBlocks * kBlock));
    size_t next = 0;
    for (int64_t p = 0; p < 2 * kLayers; ++p) {
      for (int64_t b = 0; b < kBlocks; ++b) {
        for (int64_t i = 0; i < kPlaneBytes; ++i) bytes[next++] = value(b, p, i);
      }
    }
    write(paged->address(), bytes);
  }
  void clear_paged() const {
    write(paged->address(), std::vector<uint8_t>(static_cast<size_t>(kBlocks * kBlock), 0x11));
  }
  // Whether a block of the paged cache is as fill_paged() made it, or untouched since cleared.
  bool is_filled(int64_t block) const { return looks(block, true); }
  bool is_clear(int64_t block) const { return looks(block, false); }
  bool looks(int64_t block, bool is_wanted_filled) const {
    for (int64_t p = 0; p < 2 * kLayers; ++p) {
      const auto place = static_cast<uint64_t>((p * kBlocks + block) * kPlaneBytes);
      const std::vector<uint8_t> bytes = read(paged->address() + place, kPlaneBytes);
      for (int64_t i = 0; i < kPlaneBytes; ++i) {
        const uint8_t wanted = is_wanted_filled ? value(block, p, i) : 0x11;
        if (bytes[static_cast<size_t>(i)] != wanted) return false;
      }
    }
    return true;
  }

  Batch batch(JobKind kind) const {
    Batch made;
    made.kind = kind;
    made.block_bytes = kBlock;
    made.io_bytes = kBlock;
    made.planes = planes();
    made.is_on_device = true;
    for (int64_t b = 0; b < kBlocks; ++b) {
      made.ids.push_back(b);
      made.addresses.push_back(reinterpret_cast<int64_t>(slots->data() + b * kBlock));
    }
    made.keys.assign(static_cast<size_t>(kBlocks) * 16, 7);
    return made;
  }
  Batch within(JobKind kind) const {
    Batch made = batch(kind);
    made.addresses.clear();
    made.keys.clear();
    made.is_on_device = false;
    made.device_addresses = stored_addresses();
    return made;
  }
  std::vector<int64_t> stored_addresses() const {
    std::vector<int64_t> result;
    for (int64_t b = 0; b < kBlocks; ++b) {
      result.push_back(static_cast<int64_t>(stored->address()) + b * kBlock);
    }
    return result;
  }

  std::shared_ptr<Job> start(Batch batch, double deadline_s = kLongS) const {
    std::shared_ptr<Job> job;
    CHECK_OK(engine->submit(std::move(batch), deadline_s, &job));
    return job;
  }
  std::shared_ptr<Job> run(Batch batch, JobState wanted = JobState::kDone) const {
    auto job = start(std::move(batch));
    CHECK(job->wait(kLongS));
    CHECK(job->state() == wanted);
    CHECK(job->wait_quiesced(kLongS));
    return job;
  }
  std::vector<uint64_t> offload() const {
    fill_paged();
    const auto job = run(batch(JobKind::kCopyIn));
    std::vector<uint64_t> sums(kBlocks);
    job->checksums(sums);
    return sums;
  }

  std::shared_ptr<Device> device;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<HostRegion> slots;
  std::unique_ptr<PinnedRange> pinned;
  std::unique_ptr<DeviceMemory> paged;
  std::unique_ptr<DeviceMemory> stored;
};

std::vector<int32_t> codes_of(const Job& job) {
  std::vector<int32_t> codes(static_cast<size_t>(job.blocks()));
  job.codes(codes);
  return codes;
}

void test_there_and_back(const World& world) {
  const std::vector<uint64_t> sums = world.offload();
  // The canonical form: a block's planes one after the other, checksummed as if copied by the CPU.
  for (int64_t b = 0; b < kBlocks; ++b) {
    const uint8_t* slot = world.slots->data() + b * kBlock;
    for (int64_t p = 0; p < 2 * kLayers; ++p) {
      CHECK(slot[p * kPlaneBytes + 5] == World::value(b, p, 5));
    }
    const std::vector<uint8_t> key(16, 7);
    CHECK(sums[static_cast<size_t>(b)] ==
          checksum_block(slot, kBlock, block_seed(key.data(), kBlock)));
  }
  world.clear_paged();
  Batch back = world.batch(JobKind::kCopyOut);
  back.checksums = sums;
  world.run(back);
  for (int64_t b = 0; b < kBlocks; ++b) CHECK(world.is_filled(b));
}

void test_damaged_blocks_are_not_sent(const World& world) {
  Batch back = world.batch(JobKind::kCopyOut);
  back.checksums = world.offload();
  world.clear_paged();
  back.checksums[3] ^= 1;
  const auto job = world.run(back, JobState::kFailed);
  CHECK(codes_of(*job)[3] == static_cast<int32_t>(Code::kCorrupt));
  CHECK(world.is_clear(3));
  for (int64_t b = 0; b < kBlocks; ++b) CHECK(b == 3 || world.is_filled(b));
}

void test_layers_come_in_order(const World& world) {
  Batch back = world.batch(JobKind::kCopyOut);
  back.checksums = world.offload();
  world.clear_paged();
  back.checksums[5] ^= 1;
  back.planes = world.planes(/*merges=*/false);
  back.layer_planes = 2;
  back.progress = std::make_shared<LayerProgress>(kLayers, world.device);
  const auto progress = back.progress;
  const auto job = world.start(back);
  CHECK(!progress->wait(1, 0.05));  // not sealed: another job could join
  progress->seal();
  for (int layer = 1; layer <= kLayers; ++layer) {
    CHECK(progress->wait(layer, kLongS));
    // By now the damaged block is known, whatever of the others is still on its way.
    CHECK(codes_of(*job)[5] == static_cast<int32_t>(Code::kCorrupt));
    for (int64_t p = 2 * (layer - 1); p < 2 * layer; ++p) {
      const auto place = static_cast<uint64_t>((p * kBlocks + 4) * kPlaneBytes);
      CHECK(world.read(world.paged->address() + place, kPlaneBytes)[9] == World::value(4, p, 9));
    }
  }
  CHECK(job->wait_quiesced(kLongS));
  CHECK(world.is_clear(5) && world.is_filled(4));
}

void test_inside_the_device(const World& world) {
  const std::vector<uint64_t> sums = world.offload();
  world.run(world.within(JobKind::kDeviceIn));
  world.clear_paged();
  world.run(world.within(JobKind::kDeviceOut));
  for (int64_t b = 0; b < kBlocks; ++b) CHECK(world.is_filled(b));

  // Back in host memory it is held against the checksum it had there before.
  std::memset(world.slots->data(), 0, static_cast<size_t>(world.slots->bytes()));
  Batch fetch = world.batch(JobKind::kFetch);
  fetch.is_on_device = false;
  fetch.planes = PlaneSet({});
  fetch.ids.clear();
  fetch.device_addresses = world.stored_addresses();
  fetch.checksums = sums;
  fetch.checksums[0] ^= 1;
  const auto job = world.run(fetch, JobState::kFailed);
  CHECK(codes_of(*job)[0] == static_cast<int32_t>(Code::kCorrupt));
  CHECK(job->blocks_done() == kBlocks - 1);
}

void test_bad_batches_are_refused(const World& world) {
  std::shared_ptr<Job> job;
  Batch wrong = world.batch(JobKind::kVerify);
  wrong.checksums.assign(kBlocks, 0);
  CHECK(world.engine->submit(wrong, kLongS, &job).code() == Code::kUsage);
  wrong = world.batch(JobKind::kCopyOut);
  wrong.checksums.assign(kBlocks, 0);
  wrong.planes = world.planes(false);
  wrong.layer_planes = 3;
  CHECK(world.engine->submit(wrong, kLongS, &job).code() == Code::kUsage);
  wrong = world.within(JobKind::kDeviceIn);
  wrong.device_addresses[1] = 0;
  CHECK(world.engine->submit(wrong, kLongS, &job).code() == Code::kUsage);
  CHECK(world.engine->attach_device(world.device, {}).code() == Code::kUsage);

  std::unique_ptr<Engine> bare;
  CHECK_OK(Engine::create({.copy_threads = 1}, &bare));
  CHECK(bare->submit(world.batch(JobKind::kCopyIn), kLongS, &job).code() == Code::kUsage);
}

// A device that stands still: jobs end at their deadline, memory comes free when it goes on.
void test_frozen_device(const World& world, int engine, Batch batch, bool leaves_planes = false) {
  KVX_SIMULATED(kvxsim_freeze)(engine, 1);
  if (batch.progress != nullptr) batch.progress->seal();
  const auto job = world.start(batch, 0.1);
  CHECK(job->wait(kLongS));
  CHECK(job->state() == JobState::kTimedOut);
  CHECK(!job->is_quiesced());
  CHECK(job->is_at_rest() == leaves_planes);
  CHECK(world.engine->stats().quarantined_jobs == 1);
  if (batch.progress != nullptr) CHECK(batch.progress->wait(kLayers, kLongS));
  KVX_SIMULATED(kvxsim_freeze)(engine, 0);
  CHECK(job->wait_at_rest(kLongS) && job->wait_quiesced(kLongS));
  CHECK(job->state() == JobState::kTimedOut);
}

void test_failing_copies(const World& world) {
  Batch back = world.batch(JobKind::kCopyOut);
  back.checksums = world.offload();
  const char* call = world.device->info().has_batch_copy ? "cuMemcpyBatchAsync" : "cuMemcpyAsync";
  for (const char* symbol : {call, "cuEventRecord"}) {
    KVX_SIMULATED(kvxsim_inject)(symbol, 1, /*CUDA_ERROR_UNKNOWN*/ 999, 0);
    const auto job = world.start(back);
    CHECK(job->wait(kLongS) && job->wait_quiesced(kLongS));
    for (const int32_t code : codes_of(*job)) {
      CHECK(code == static_cast<int32_t>(Code::kOk) || code == static_cast<int32_t>(Code::kDevice));
    }
  }
}

void test_on(const std::function<std::shared_ptr<Device>()>& open) {
  test_there_and_back(World(open()));
  test_damaged_blocks_are_not_sent(World(open()));
  test_layers_come_in_order(World(open()));
  test_inside_the_device(World(open()));
  test_bad_batches_are_refused(World(open()));
}

void test_emulated() {
  test_on([] {
    std::shared_ptr<Device> device;
    CHECK_OK(open_emulated_device(64 << 20, &device));
    return device;
  });
}

void test_simulated() {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    KVX_SIMULATED(kvxsim_set_shuffle_seed)(seed);
    test_on([] { return open_simulated(); });
  }
  KVX_SIMULATED(kvxsim_set_has_batch_copy)(0);
  test_on([] { return open_simulated(); });
}

// Into slots, and from there to planes in host memory: those the device does not touch.
Batch fetch_to(const World& world, HostRegion& target, const std::vector<uint64_t>& sums) {
  Batch fetch = world.batch(JobKind::kFetch);
  const Plane plane{target.data(), kBlock, kBlock};
  fetch.planes = PlaneSet({&plane, 1});
  fetch.is_on_device = false;
  fetch.device_addresses = world.stored_addresses();
  fetch.checksums = sums;
  return fetch;
}

void test_frozen() {
  const auto target = host_memory(kBlocks * kBlock);
  const World world(open_simulated());
  Batch back = world.batch(JobKind::kCopyOut);
  back.checksums = world.offload();
  test_frozen_device(world, kKvxsimDeviceToHost, world.batch(JobKind::kCopyIn));
  test_frozen_device(world, kKvxsimHostToDevice, back);
  test_frozen_device(world, kKvxsimOnDevice, world.within(JobKind::kDeviceIn));
  test_frozen_device(world, kKvxsimDeviceToHost, fetch_to(world, *target, back.checksums),
                     /*leaves_planes=*/true);
  back.planes = world.planes(false);
  back.layer_planes = 2;
  back.progress = std::make_shared<LayerProgress>(kLayers, world.device);
  test_frozen_device(world, kKvxsimHostToDevice, back);
}

void test_failing() { test_failing_copies(World(open_simulated())); }

}  // namespace

}  // namespace kvx::test

int main() {
  using namespace kvx::test;
  test_emulated();
  RUN_ON_SIMULATION(test_simulated);
  RUN_ON_SIMULATION(test_frozen);
  RUN_ON_SIMULATION(test_failing);
  return 0;
}
