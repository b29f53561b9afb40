// When a job's planes are its caller's again: with the last copy, whatever its requests still do.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <mutex>
#include <random>
#include <thread>

#include "engine_fixture.h"
#include "planes_gate.h"
#include "shim/fence.h"
#include "shim/sabotage.h"

namespace kvx::test {

namespace {

constexpr uint8_t kReused = 0xEE;

void reuse(Memory& planes) { std::fill(planes.data.begin(), planes.data.end(), kReused); }
bool is_reused(const Memory& planes) {
  return std::all_of(planes.data.begin(), planes.data.end(),
                     [](uint8_t byte) { return byte == kReused; });
}

Batch scatter(Memory& planes, Memory& slots, const std::vector<uint64_t>& sums) {
  Batch batch = checked(JobKind::kCopyOut, slots, sums);
  batch.planes = planes.planes();
  batch.ids = counting(planes.blocks, 1);
  return batch;
}

Batch read_to(Memory& planes, Memory& slots, const std::vector<uint64_t>& sums, int fd) {
  Batch batch = scatter(planes, slots, sums);
  batch.kind = JobKind::kRead;
  with_files(&batch, fd);
  return batch;
}

// Waits for another thread, which is sure to come.
void wait_until_hung(const Failpoints& faults) {
  const auto is_hung = [&] { return faults.hits()[static_cast<size_t>(FaultAction::kHang)] > 0; };
  while (!is_hung()) std::this_thread::yield();
}

void test_the_gate() {
  PlanesGate gate;
  CHECK(!gate.is_at_rest());
  CHECK(gate.enter() && gate.enter());
  CHECK(!gate.leave());
  CHECK(gate.enter());
  gate.end();
  CHECK(!gate.is_at_rest() && !gate.enter());
  CHECK(!gate.leave() && !gate.is_at_rest());
  CHECK(gate.leave() && gate.is_at_rest());
  CHECK(!gate.enter() && gate.is_at_rest());
}

// Threads enter and leave, one ends it: nobody is inside once it is at rest, and one is told.
void test_the_gate_among_threads() {
  for (int round = 0; round < 200; ++round) {
    PlanesGate gate;
    int64_t inside = 0;  // not atomic: the gate alone orders it with the one who waits
    std::atomic<int> told{0};
    std::mutex mutex;
    const auto pass = [&] {
      while (gate.enter()) {
        {
          std::lock_guard lock(mutex);
          ++inside;
        }
        {
          std::lock_guard lock(mutex);
          --inside;
        }
        if (gate.leave()) ++told;
      }
    };
    std::array<std::thread, 3> threads{std::thread(pass), std::thread(pass), std::thread(pass)};
    if (round % 2 == 0) std::this_thread::yield();
    gate.end();
    while (!gate.is_at_rest()) std::this_thread::yield();
    CHECK(inside == 0);
    for (std::thread& thread : threads) thread.join();
    CHECK(told.load() <= 1);
  }
}

void test_a_read_that_hangs_leaves_the_planes(BackendKind kind, bool by_deadline) {
  auto faults = std::make_shared<Failpoints>();
  auto engine = make(kind, 2, faults);
  Memory planes(8);
  Memory slots(8);
  const int fd = temporary_file();
  CHECK(faults
            ->set({.target = FaultTarget::kRead,
                   .action = FaultAction::kHang,
                   .after = 3,
                   .ignores_cancel = true})
            .ok());
  const std::vector<uint64_t> sums(8);
  const auto job = start(*engine, read_to(planes, slots, sums, fd), by_deadline ? 0.05 : kLongS);
  CHECK(!job->is_at_rest() && !job->wait_at_rest(0.0));
  if (!by_deadline) {
    wait_until_hung(*faults);
    CHECK(job->cancel());
  }
  CHECK(job->wait_at_rest(kLongS));
  CHECK(job->is_terminal() && !job->is_quiesced());
  reuse(planes);
  faults->clear();
  CHECK(job->wait_quiesced(kLongS));
  CHECK(is_reused(planes));
  CHECK(engine->close(5.0).abandoned_jobs == 0);
  close(fd);
}

// Whether what was written where the planes are said to be at rest has stayed there. A copy that
// hangs goes on after that, so it is no race, but wrong.
bool survives_a_hung_copy(bool by_deadline) {
  auto faults = std::make_shared<Failpoints>();
  auto engine = make(BackendKind::kPosix, 2, faults);
  Memory planes(4);
  Memory slots(4);
  CHECK(faults->set({.target = FaultTarget::kCopy, .action = FaultAction::kHang, .count = 1}).ok());
  const std::vector<uint64_t> sums(4);
  const auto job = start(*engine, scatter(planes, slots, sums), by_deadline ? 0.05 : kLongS);
  wait_until_hung(*faults);
  if (!by_deadline) CHECK(job->cancel());
  CHECK(job->wait(kLongS));
  if (!job->wait_at_rest(0.02)) {
    CHECK(!job->is_at_rest());
    std::thread waiter([&] { CHECK(job->wait_at_rest(kLongS)); });
    faults->clear();
    waiter.join();
  }
  reuse(planes);
  faults->clear();
  CHECK(job->wait_quiesced(kLongS));
  CHECK(engine->close(5.0).abandoned_jobs == 0);
  return is_reused(planes);
}

struct Toll {
  std::atomic<int> caught{0};  // jobs that had ended while their planes were in use
  std::atomic<int> lost{0};    // of those, where something was written afterwards
};

// Jobs that end early while their copies run, of every kind that has planes.
void end_jobs_early(Engine& engine, int fd, uint64_t seed, Toll* toll) {
  std::mt19937_64 random(seed);
  for (int i = 0; i < 150; ++i) {
    const auto count = static_cast<int64_t>(1 + random() % 20);
    Memory planes(count);
    Memory slots(count);
    const std::vector<uint64_t> sums(static_cast<size_t>(count));
    const uint64_t kind = random() % 3;
    Batch batch = kind == 0   ? gather(planes, slots)
                  : kind == 1 ? scatter(planes, slots, sums)
                              : read_to(planes, slots, sums, fd);
    const std::chrono::microseconds pause(random() % 600);
    const bool by_deadline = random() % 3 == 0;
    const auto job =
        start(engine, std::move(batch),
              by_deadline ? std::chrono::duration<double>(pause).count() + 1e-6 : kLongS);
    if (!by_deadline) std::this_thread::sleep_for(pause);
    if (by_deadline) CHECK(job->wait(kLongS));
    if (!by_deadline) job->cancel();
    if (!job->is_at_rest()) ++toll->caught;
    CHECK(job->wait_at_rest(kLongS));
    CHECK(job->is_terminal());
    reuse(planes);
    CHECK(job->wait_quiesced(kLongS));
    if (!is_reused(planes)) ++toll->lost;
  }
}

void run_storm(BackendKind kind, uint64_t seed, Toll* toll) {
  auto faults = std::make_shared<Failpoints>();
  CHECK(faults
            ->set({.target = FaultTarget::kCopy,
                   .action = FaultAction::kDelay,
                   .probability = 0.3,
                   .seed = seed,
                   .delay_s = 0.0003})
            .ok());
  auto engine = make(kind, 3, faults);
  const int fd = temporary_file();
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] { end_jobs_early(*engine, fd, seed + i, toll); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(engine->close(5.0).abandoned_jobs == 0);
  close(fd);
}

void test_storm(BackendKind kind, uint64_t seed) {
  Toll toll;
  run_storm(kind, seed, &toll);
  CHECK(toll.caught.load() > 0 && toll.lost.load() == 0);
}

// What lets go of the planes early is found: by the copy that hangs, and by the storm.
void test_a_mistake_is_found(uint64_t seed) {
  mistake().store(Mistake::kRestsEarly);
  CHECK(!survives_a_hung_copy(false) && !survives_a_hung_copy(true));
  // ThreadSanitizer has no fences, and would find the race that this mistake makes by itself.
  if (kHasFences) {
    Toll toll;
    run_storm(BackendKind::kPosix, seed, &toll);
    CHECK(toll.lost.load() > 0);
  }
  mistake().store(Mistake::kNone);
}

}  // namespace

}  // namespace kvx::test

int main() {
  using namespace kvx;
  using namespace kvx::test;
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  test_the_gate();
  test_the_gate_among_threads();
  std::vector<BackendKind> kinds = {BackendKind::kPosix};
  if (probe_io_uring().ok()) kinds.push_back(BackendKind::kUring);
  for (const BackendKind kind : kinds) {
    for (const bool by_deadline : {false, true}) {
      test_a_read_that_hangs_leaves_the_planes(kind, by_deadline);
    }
    test_storm(kind, seed);
  }
  for (const bool by_deadline : {false, true}) CHECK(survives_a_hung_copy(by_deadline));
  test_a_mistake_is_found(seed);
  return 0;
}
