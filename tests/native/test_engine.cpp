// The engine under sanitizers: many threads submitting, waiting, cancelling and closing at once.
#include <algorithm>
#include <atomic>
#include <random>
#include <thread>

#include "engine_fixture.h"

namespace kvx::test {

namespace {

void test_round_trip(BackendKind kind) {
  auto engine = make(kind, 3);
  Memory planes(200);
  Memory slots(200);
  Memory back(200);
  Memory target(200);
  planes.fill(1);
  const int fd = temporary_file();
  const auto in = start(*engine, gather(planes, slots));
  expect(*in, JobState::kDone);
  const auto sums = sums_of(*in);
  expect(*start(*engine, store(slots, fd)), JobState::kDone);
  Batch batch = checked(JobKind::kRead, back, sums);
  with_files(&batch, fd);
  batch.planes = target.planes();
  batch.ids = counting(200, 1);
  expect(*start(*engine, batch), JobState::kDone);
  CHECK(target.data == planes.data);
  batch.checksums[9] ^= 1;
  const auto spoiled = start(*engine, batch);
  expect(*spoiled, JobState::kFailed);
  CHECK(codes_of(*spoiled)[9] == static_cast<int32_t>(Code::kCorrupt));
  CHECK(spoiled->blocks_done() == 199);
  CHECK(std::all_of(target.at(9), target.at(10), [](uint8_t byte) { return byte == 0xff; }));
  CHECK(engine->close(5.0).abandoned_jobs == 0);
  close(fd);
}

// Every kind of job ends in every way, from several threads, while one reactor takes notifications.
void test_storm(BackendKind kind, uint64_t seed) {
  auto faults = std::make_shared<Failpoints>();
  CHECK(faults
            ->set({.target = FaultTarget::kAny,
                   .action = FaultAction::kDelay,
                   .probability = 0.05,
                   .seed = seed,
                   .delay_s = 0.002})
            .ok());
  CHECK(faults
            ->set({.target = FaultTarget::kCopy,
                   .action = FaultAction::kDelay,
                   .probability = 0.02,
                   .seed = seed,
                   .delay_s = 0.002})
            .ok());
  CHECK(faults
            ->set({.target = FaultTarget::kRead,
                   .action = FaultAction::kEio,
                   .probability = 0.01,
                   .seed = seed})
            .ok());
  auto engine = make(kind, 2, faults);
  const int fd = temporary_file();
  std::atomic<int64_t> terminal{0};
  std::atomic<int64_t> quiesced{0};
  constexpr int kThreads = 4;
  constexpr int kJobs = 60;
  auto submitter = [&](int thread) {
    std::mt19937_64 random(seed + static_cast<uint64_t>(thread));
    for (int i = 0; i < kJobs; ++i) {
      const auto count = static_cast<int64_t>(1 + random() % 20);
      Memory planes(count);
      Memory slots(count);
      const std::vector<uint64_t> sums(static_cast<size_t>(count));
      Batch batch;
      switch (random() % 4) {
        case 0:
          batch = gather(planes, slots);
          break;
        case 1:
          batch = checked(JobKind::kVerify, slots, sums);
          break;
        case 2:
          batch = checked(JobKind::kRead, slots, sums);
          with_files(&batch, fd);
          batch.planes = planes.planes();
          batch.ids = counting(count, 1);
          break;
        default:
          batch = store(slots, fd);
      }
      const auto job = start(*engine, batch, random() % 3 == 0 ? 0.001 : kLongS);
      if (random() % 3 == 0) job->cancel();
      CHECK(job->wait(kLongS));
      const auto codes = codes_of(*job);
      CHECK(std::none_of(codes.begin(), codes.end(), [](int32_t code) { return code < 0; }));
      CHECK(job->wait_quiesced(kLongS));
      CHECK(codes_of(*job) == codes);  // results are final; memory is freed here
    }
  };
  std::thread reactor([&] {
    while (quiesced.load() < kThreads * kJobs) {
      for (const Completion& completion : engine->next_completions(16, 1.0)) {
        if ((completion.flags & kFlagTerminal) != 0) ++terminal;
        if ((completion.flags & kFlagQuiesced) != 0) ++quiesced;
      }
    }
  });
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back(submitter, i);
  for (std::thread& thread : threads) thread.join();
  reactor.join();
  CHECK(terminal.load() == kThreads * kJobs);
  const EngineStats stats = engine->stats();
  CHECK(stats.quarantined_jobs == 0 && stats.quarantined_bytes == 0);
  CHECK(stats.jobs_by_state[0] == 0 && stats.io_in_flight == 0);
  close(fd);
}

// Two waiters help with one job while a third cancels it, again and again.
void test_cancel_races_with_helpers() {
  auto engine = make(BackendKind::kPosix, 2);
  Memory planes(600);
  Memory slots(600);
  planes.fill(3);
  for (int round = 0; round < 50; ++round) {
    const auto job = start(*engine, gather(planes, slots));
    std::thread first([&] { CHECK(job->wait(kLongS)); });
    std::thread second([&] { CHECK(job->wait_quiesced(kLongS)); });
    std::thread third([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(round * 10));
      const bool has_cancelled = job->cancel();
      CHECK(job->wait(kLongS));
      CHECK(has_cancelled == (job->state() == JobState::kCancelled));
    });
    first.join();
    second.join();
    third.join();
  }
}

void test_close_while_submitting() {
  for (int round = 0; round < 10; ++round) {
    auto engine = make(BackendKind::kAuto, 2);
    const int fd = temporary_file();
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([&, i] {
        Memory planes(50);
        Memory slots(50);
        for (;;) {
          std::shared_ptr<Job> job;
          Batch batch = i == 0 ? store(slots, fd) : gather(planes, slots);
          const Status status = engine->submit(std::move(batch), kLongS, &job);
          if (!status.ok()) {
            CHECK(status.code() == Code::kCancelled);
            return;
          }
          CHECK(job->wait(kLongS));
          CHECK(job->wait_quiesced(kLongS));
        }
      });
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    CHECK(engine->close(5.0).abandoned_jobs == 0);
    for (std::thread& thread : threads) thread.join();
    close(fd);
  }
}

void test_stuck_copy_outlives_the_engine() {
  auto faults = std::make_shared<Failpoints>();
  CHECK(faults->set({.target = FaultTarget::kCopy, .action = FaultAction::kHang, .count = 1}).ok());
  auto engine = make(BackendKind::kPosix, 2, faults);
  Memory planes(4);
  Memory slots(4);
  planes.fill(5);
  const auto job = start(*engine, gather(planes, slots), 0.05);
  expect(*job, JobState::kTimedOut);
  CHECK(job->latency_ns() < 150'000'000);
  const CloseReport report = engine->close(0.1);
  CHECK(report.abandoned_jobs == 1 && report.abandoned_bytes == 4 * kBlock);
  engine.reset();
  CHECK(!job->is_quiesced());
  faults->clear();
  CHECK(job->wait_quiesced(kLongS));
}

}  // namespace

}  // namespace kvx::test

int main() {
  using namespace kvx;
  using namespace kvx::test;
  const uint64_t seed = std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::vector<BackendKind> kinds = {BackendKind::kPosix};
  if (probe_io_uring().ok()) kinds.push_back(BackendKind::kUring);
  for (const BackendKind kind : kinds) {
    test_round_trip(kind);
    test_storm(kind, seed);
  }
  test_cancel_races_with_helpers();
  test_close_while_submitting();
  test_stuck_copy_outlives_the_engine();
  return 0;
}
