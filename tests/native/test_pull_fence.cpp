// Is a block that was reused while it was pulled ever taken for the one that was leased? At every
// step of a pull an owner may evict (revoke), rewrite row by row, and lease again. Nothing that was
// pulled may hold a byte of another version. The same run without the second look at the lease must
// find some that do: the test can fail.
//
// One thread plays every interleaving from a seed, so that a failure repeats; then two threads
// race. Usage: test_pull_fence [interleavings] [seed]
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "pull_fixture.h"
#include "shim/fence.h"
#include "shim/sabotage.h"

namespace {

using namespace pulls;

constexpr size_t kSlots = 3;
constexpr int64_t kRows = 4;
constexpr int64_t kRowBytes = 16;
constexpr int64_t kSlotBytes = kRows * kRowBytes;

// Row r of slot s lies at r * (all slots' rows) + s * row: no two rows of a slot touch.
Descriptor slot_rows(size_t slot) {
  return {static_cast<int64_t>(slot) * kRowBytes, kRowBytes * static_cast<int64_t>(kSlots), kRows,
          kRowBytes};
}

// Every version of a slot has bytes of its own.
uint64_t content(size_t slot, uint64_t version) { return slot << 56 | version; }

struct Counts {
  int64_t served = 0;
  int64_t refused = 0;
  int64_t wrong = 0;
};

bool is_all(const std::vector<uint8_t>& bytes, uint64_t expected) {
  for (size_t at = 0; at < bytes.size(); at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes.data() + at, sizeof(word));
    if (word != expected) return false;
  }
  return true;
}

void print(const char* what, const Counts& counts) {
  std::printf("%s: %lld served, %lld refused, %lld wrong\n", what,
              static_cast<long long>(counts.served), static_cast<long long>(counts.refused),
              static_cast<long long>(counts.wrong));
}

class Simulation {
 public:
  explicit Simulation(uint64_t seed)
      : random_(seed),
        bed_(std::vector<uint8_t>(kSlots * kSlotBytes), std::vector<uint8_t>(kSlotBytes)) {
    for (size_t slot = 0; slot < kSlots; ++slot) {
      kvx::RemotePlan plan = bed_.plan({{0, 0, 1, kSlotBytes}}, {slot_rows(slot)});
      tasks_[slot] = bed_.task(std::move(plan), {});
    }
    kvx::interruption() = [this] {
      while (random_() % 3 == 0) play_owner();
    };
  }
  ~Simulation() { kvx::interruption() = nullptr; }

  void pull() {
    const size_t slot = random_() % kSlots;
    const Slot seen = slots_[slot];
    kvx::PullTask& task = *tasks_[slot];
    task.lease_slot = seen.ref.slot;
    task.lease_generation = seen.ref.generation;
    const kvx::PullOutcome outcome = pull_block(task, 0);
    if (outcome.code != Code::kOk) {
      CHECK(outcome.code == Code::kStale);
      ++counts_.refused;
      return;
    }
    ++counts_.served;
    if (!is_all(bed_.target, content(slot, seen.leased_version))) ++counts_.wrong;
  }

  const Counts& counts() const { return counts_; }

 private:
  struct Slot {
    LeaseRef ref;  // the last one granted
    uint64_t leased_version = 0;
    uint64_t version = 1;  // being written
    int64_t written = 0;
    bool is_leased = false;
  };

  // One step: a leased slot is evicted, another is rewritten by a row, or leased once it is whole.
  void play_owner() {
    const size_t index = random_() % kSlots;
    Slot& slot = slots_[index];
    const Descriptor rows = slot_rows(index);
    if (slot.is_leased) {
      if (random_() % 8 != 0) return;  // else hardly a pull would find one
      CHECK(bed_.leases->revoke(slot.ref.id, 0).ok());
      slot.is_leased = false;
      slot.written = 0;
      ++slot.version;
    } else if (slot.written < kRows) {
      const uint64_t word = content(index, slot.version);
      uint8_t* row = bed_.source.data() + rows.offset + slot.written * rows.stride;
      for (int64_t at = 0; at < kRowBytes; at += 8) std::memcpy(row + at, &word, sizeof(word));
      ++slot.written;
    } else {
      slot.ref = bed_.grant({rows});
      slot.leased_version = slot.version;
      slot.is_leased = true;
    }
  }

  std::mt19937_64 random_;
  Bed bed_;
  std::array<std::shared_ptr<kvx::PullTask>, kSlots> tasks_;
  std::array<Slot, kSlots> slots_;
  Counts counts_;
};

Counts simulate(uint64_t seed, int64_t interleavings, kvx::Mistake mistake) {
  kvx::mistake() = mistake;
  Simulation simulation(seed);
  for (int64_t i = 0; i < interleavings; ++i) simulation.pull();
  kvx::mistake() = kvx::Mistake::kNone;
  const Counts& counts = simulation.counts();
  print(mistake == kvx::Mistake::kNone ? "with the fence" : "without", counts);
  return counts;
}

// An owner that evicts, rewrites with streaming stores and leases again, while another thread
// pulls. The bytes are read while they are written, on purpose.
class Race {
 public:
  Race() : bed_(std::vector<uint8_t>(kBytes), std::vector<uint8_t>(kBytes)) {}

  Counts run() {
    std::thread owner([this] { own(); });
    const auto end = kvx::time_after(5.0);
    auto task = bed_.task(bed_.plan({{0, 0, 1, kBytes}}, {{0, 0, 1, kBytes}}), {});
    Counts counts;
    while ((counts.served < 20'000 || counts.refused < 20'000) && kvx::Clock::now() < end) {
      uint64_t version = 0;
      {
        std::lock_guard lock(mutex_);
        task->lease_slot = ref_.slot;
        task->lease_generation = ref_.generation;
        version = version_;
      }
      if (pull_block(*task, 0).code != Code::kOk) {
        ++counts.refused;
        continue;
      }
      ++counts.served;
      if (!is_all(bed_.target, version)) ++counts.wrong;
    }
    is_over_ = true;
    owner.join();
    print("two threads", counts);
    return counts;
  }

 private:
  static constexpr int64_t kBytes = 64 << 10;

  void own() {
    std::vector<uint64_t> words(kBytes / 8);
    for (uint64_t version = 1; !is_over_; ++version) {
      CHECK(bed_.leases->revoke(ref_.id, 0).ok());
      std::fill(words.begin(), words.end(), version);
      kvx::fastest_checksum_kernel().copy_only(bed_.source.data(),
                                               reinterpret_cast<const uint8_t*>(words.data()),
                                               kBytes, kvx::Stores::kStreaming);
      {
        const LeaseRef ref = bed_.grant_all();
        std::lock_guard lock(mutex_);
        ref_ = ref;
        version_ = version;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(version % 64));
    }
  }

  Bed bed_;
  std::mutex mutex_;
  LeaseRef ref_;          // mutex_, written by the owner
  uint64_t version_ = 0;  // mutex_
  std::atomic<bool> is_over_{false};
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t interleavings = argc > 1 ? std::atoll(argv[1]) : 1'000'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("seed %llu, %lld interleavings\n", static_cast<unsigned long long>(seed),
              static_cast<long long>(interleavings));
  const Counts fenced = simulate(seed, interleavings, kvx::Mistake::kNone);
  CHECK(fenced.wrong == 0 && fenced.served > 0 && fenced.refused > 0);
  const Counts unfenced = simulate(seed, interleavings / 10, kvx::Mistake::kSkipsFence);
  CHECK(unfenced.wrong > 0);
  // ThreadSanitizer would rightly report this one.
  if (kvx::kHasFences) {
    const Counts raced = Race().run();
    CHECK(raced.wrong == 0 && raced.served > 0);
  }
  return 0;
}
