// The copy threads: every block of every job is decided once, nothing is touched after it quiesced.
// Usage: test_puller [seed]
#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <latch>
#include <mutex>
#include <thread>

#include "pull_fixture.h"

namespace {

using namespace pulls;
using kvx::Puller;
using kvx::PullTask;
using kvx::RemoteRecord;

// What the agent does with the word of a copy thread: counts, and tells who waits.
class Owner {
 public:
  Puller::OnGrain on_grain() {
    return [this](RemoteRecord& record, int64_t holds, int64_t settled) {
      ++grains;
      const kvx::Balance left = record.ledger.release(holds, settled);
      if (left.open == 0) end(record, Code::kOk);
      if (left.holds == 0) quiesce(record);
    };
  }

  // Decides what is open, as the deadline does, or nothing where all is; gives back the job's hold.
  void end(RemoteRecord& record, Code code) {
    if (record.is_claimed.exchange(true)) return;
    record.ledger.settle_rest(code);
    if (record.ledger.release(1, 0).holds == 0) quiesce(record);
  }

  void wait_quiesced(RemoteRecord& record) {
    std::unique_lock lock(record.mutex);
    CHECK(record.ended.wait_for(lock, std::chrono::seconds(60),
                                [&] { return record.is_quiesced.load(); }));
  }

  std::atomic<int64_t> grains{0};

 private:
  static void quiesce(RemoteRecord& record) {
    std::lock_guard lock(record.mutex);
    record.is_quiesced = true;
    record.ended.notify_all();
  }
};

std::vector<Descriptor> rows(int64_t first, int64_t count, int64_t bytes) {
  std::vector<Descriptor> blocks;
  for (int64_t i = 0; i < count; ++i) blocks.push_back({(first + i) * bytes, 0, 1, bytes});
  return blocks;
}

void test_grains(std::mt19937_64& random) {
  Bed bed(random_bytes(random, 1 << 16), std::vector<uint8_t>(1 << 20));
  auto record_of = [&](int64_t blocks, int64_t bytes) {
    return bed.task(bed.plan(rows(0, blocks, bytes), rows(0, blocks, bytes)), {})->record;
  };
  CHECK(record_of(1000, 1)->grain_blocks == 1024);
  CHECK(record_of(1, 1 << 16)->grain_blocks == 16);
  const auto small = record_of(2, 4);
  CHECK(std::all_of(small->key_of(1), small->key_of(1) + 16, [](uint8_t b) { return b == 0; }));
  // Every block once, whoever takes it: grains of one, and all threads at once.
  constexpr size_t kBlocks = 100'000;
  constexpr int kRounds = 20;
  const std::vector<Descriptor> same(kBlocks, Descriptor{0, 0, 1, 1 << 20});
  const auto record = bed.task(bed.plan(same, same), {})->record;
  CHECK(record->grain_blocks == 1);
  std::vector<std::atomic<int>> taken(kBlocks);
  std::barrier round(2, [&]() noexcept { record->cursor = 0; });
  auto take_all = [&] {
    for (int i = 0; i < kRounds; ++i) {
      round.arrive_and_wait();
      int64_t first = 0;
      int64_t count = 0;
      while (record->take(&first, &count)) {
        for (int64_t at = first; at < first + count; ++at) ++taken[static_cast<size_t>(at)];
      }
    }
  };
  std::thread other(take_all);
  take_all();
  other.join();
  for (const std::atomic<int>& times : taken) CHECK(times == kRounds);
}

void test_help_needs_no_thread(std::mt19937_64& random) {
  Bed bed(random_bytes(random, 4096), std::vector<uint8_t>(4096));
  Owner owner;
  Puller puller;
  puller.start(2, owner.on_grain());
  const LeaseRef ref = bed.grant_all();
  const auto other = bed.task(bed.plan(rows(1, 1, 64), rows(1, 1, 64)), ref);
  const auto task = bed.task(bed.plan(rows(0, 1, 64), rows(0, 1, 64)), ref);
  CHECK(!puller.help(*task->record));
  puller.submit(other, false);
  puller.submit(task, false);
  CHECK(puller.queued() == 2);
  // Someone else's is left alone; at the end of the help it is left to the threads.
  CHECK(puller.help(*task->record) && task->record->is_quiesced);
  CHECK(!puller.help(*task->record));
  CHECK(canonical(bed.target, {0, 0, 1, 64}) == canonical(bed.source, {0, 0, 1, 64}));
  owner.wait_quiesced(*other->record);
  CHECK(puller.queued() == 0 && puller.threads_begun() == 1 && owner.grains == 2);
}

void test_nothing_is_kept(std::mt19937_64& random) {
  Bed bed(random_bytes(random, 4096), std::vector<uint8_t>(4096));
  Owner owner;
  const LeaseRef ref = bed.grant_all();
  std::weak_ptr<RemoteRecord> copied;
  std::weak_ptr<RemoteRecord> forgotten;
  std::weak_ptr<RemoteRecord> stopped;
  Puller puller;
  puller.start(2, owner.on_grain());
  auto submit = [&](std::weak_ptr<RemoteRecord>* watch) {
    auto task = bed.task(bed.plan(rows(0, 4, 64), rows(0, 4, 64)), ref);
    *watch = task->record;
    puller.submit(std::move(task), false);
  };
  submit(&copied);
  RemoteRecord* record = copied.lock().get();
  CHECK(puller.help(*record));
  CHECK(copied.expired());
  submit(&forgotten);
  puller.forget(*forgotten.lock());
  CHECK(forgotten.expired() && puller.queued() == 0);
  submit(&stopped);
  CHECK(puller.threads_begun() == 0);
  puller.stop();
  CHECK(stopped.expired());
  submit(&stopped);  // dropped
  CHECK(stopped.expired() && !puller.threads_begun());
  puller.stop();
}

// One that left before the end lets the threads do the rest.
void test_wake(std::mt19937_64& random) {
  Bed bed(random_bytes(random, 1 << 20), std::vector<uint8_t>(1 << 20));
  Owner owner;
  Puller puller;
  puller.start(2, owner.on_grain());
  const auto task = bed.task(bed.plan(rows(0, 4096, 256), rows(0, 4096, 256)), bed.grant_all());
  puller.submit(task, false);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK(owner.grains == 0 && puller.threads_begun() == 0);
  puller.wake();
  owner.wait_quiesced(*task->record);
  CHECK(owner.grains == 4 && bed.target == bed.source);
  puller.wake();
}

// One submit calls one thread, and that one the next: two grains are under way at the same time.
void test_threads_share_a_job(std::mt19937_64& random) {
  Bed bed(random_bytes(random, 2 << 20), std::vector<uint8_t>(2 << 20));
  Owner owner;
  Puller puller;
  puller.start(2, owner.on_grain());
  const auto blocks = rows(0, 4, 1 << 19);
  const auto task = bed.task(bed.plan(blocks, blocks), bed.grant_all());
  CHECK(task->record->grain_blocks == 2);
  std::latch both(2);
  task->may_write = [&] {
    static thread_local bool has_arrived = false;
    if (!has_arrived) both.arrive_and_wait();
    return has_arrived = true;
  };
  puller.submit(task, true);
  owner.wait_quiesced(*task->record);
  CHECK(puller.threads_begun() == 2 && bed.target == bed.source);
}

void test_failures_are_told(std::mt19937_64& random) {
  Bed bed(random_bytes(random, 4096), std::vector<uint8_t>(4096));
  Owner owner;
  Puller puller;
  puller.start(1, owner.on_grain());
  const LeaseRef ref = bed.grant_all();
  kvx::RemotePlan plan = bed.plan(rows(0, 3, 64), rows(0, 3, 64));
  const std::vector<uint8_t> key(kvx::kKeyBytes);
  for (int64_t i = 0; i < 3; ++i) {
    plan.checksums.push_back(checksum_of(canonical(bed.source, {i * 64, 0, 1, 64}), key.data()));
  }
  plan.checksums[1] ^= 1;
  const auto task = bed.task(std::move(plan), ref);
  puller.submit(task, true);
  owner.wait_quiesced(*task->record);
  const RemoteRecord& record = *task->record;
  CHECK(record.has_failed && !record.is_lost);
  CHECK(record.ledger.code(0) == 0 && record.ledger.code(2) == 0);
  CHECK(record.ledger.code(1) == static_cast<int32_t>(Code::kCorrupt));
  CHECK(record.ledger.checksum(1) == (record.plan->checksums[1] ^ 1));
  const auto lost = bed.task(bed.plan(rows(0, 1, 64), rows(0, 1, 64)), ref);
  lost->source.mapped = nullptr;
  lost->is_peer_there = [] { return false; };
  puller.submit(lost, true);
  owner.wait_quiesced(*lost->record);
  CHECK(lost->record->has_failed && lost->record->is_lost);
}

// Jobs from several threads, some helped along and some ended in the midst; a job that has
// quiesced has its target filled by its owner, and nobody may write there any more.
class Storm {
 public:
  Storm(std::mt19937_64& random)
      : bed_(random_bytes(random, kThreads * kJobBytes),
             std::vector<uint8_t>(kThreads * kJobBytes)) {
    puller_.start(2, owner_.on_grain());
    ref_ = bed_.grant_all();
  }

  void run(uint64_t seed) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < kThreads; ++i) threads.emplace_back([=, this] { play(seed, i); });
    for (std::thread& thread : threads) thread.join();
    CHECK(whole_ > 0 && ended_ > 0);
    puller_.stop();
    CHECK(puller_.queued() == 0);
  }

 private:
  static constexpr int64_t kThreads = 3;
  static constexpr int64_t kBlockBytes = 512;
  static constexpr int64_t kBlocks = 3000;
  static constexpr int64_t kJobBytes = kBlocks * kBlockBytes;

  void play(uint64_t seed, int64_t index) {
    std::mt19937_64 random(seed + static_cast<uint64_t>(index));
    for (int round = 0; round < 60; ++round) {
      const auto blocks = static_cast<int64_t>(1 + random() % kBlocks);
      const auto local = rows(index * kBlocks, blocks, kBlockBytes);
      const auto remote = rows((index + round) % kThreads * kBlocks, blocks, kBlockBytes);
      auto task = bed_.task(bed_.plan(local, remote), ref_);
      const std::shared_ptr<RemoteRecord> record = task->record;
      const bool wakes = random() % 2 == 0;
      puller_.submit(std::move(task), wakes);
      const uint64_t helps = random() % 4;
      for (uint64_t i = 0; i < helps && puller_.help(*record); ++i) {
      }
      const bool is_cut = random() % 3 == 0;
      if (is_cut) {
        owner_.end(*record, Code::kCancelled);
        puller_.forget(*record);
      } else if (!wakes) {
        puller_.wake();
      }
      owner_.wait_quiesced(*record);
      check(*record, local, remote);
    }
  }

  void check(const RemoteRecord& record, const std::vector<Descriptor>& local,
             const std::vector<Descriptor>& remote) {
    bool is_whole = true;
    for (size_t i = 0; i < local.size(); ++i) {
      const int32_t code = record.ledger.code(static_cast<int64_t>(i));
      CHECK(code == 0 || code == static_cast<int32_t>(Code::kCancelled) ||
            code == static_cast<int32_t>(Code::kSkipped));
      is_whole = is_whole && code == 0;
      uint8_t* target = bed_.target.data() + local[i].offset;
      if (code == 0)
        CHECK(std::memcmp(target, bed_.source.data() + remote[i].offset, kBlockBytes) == 0);
      std::memset(target, 0x5a, kBlockBytes);  // under TSan: nobody else is at it
    }
    ++(is_whole ? whole_ : ended_);
    for (const Descriptor& block : local) {
      const uint8_t* target = bed_.target.data() + block.offset;
      CHECK(std::all_of(target, target + kBlockBytes, [](uint8_t byte) { return byte == 0x5a; }));
    }
  }

  Bed bed_;
  Owner owner_;
  Puller puller_;
  LeaseRef ref_;
  std::atomic<int64_t> whole_{0};
  std::atomic<int64_t> ended_{0};
};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  test_grains(random);
  test_help_needs_no_thread(random);
  test_nothing_is_kept(random);
  test_wake(random);
  test_threads_share_a_job(random);
  test_failures_are_told(random);
  Storm(random).run(seed);
  std::puts("puller: ok");
  return 0;
}
