// Leases over threads: what revoke() returned from is never used again.
// Usage: test_lease_threads [seed]
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "kvx/lease_table.h"

namespace {

using kvx::Code;
using kvx::LeaseRef;
using kvx::LeaseTable;
using kvx::LeaseUse;

constexpr int64_t kBlockBytes = 64;
constexpr size_t kBlocks = 8;

struct Bed {
  Bed() {
    CHECK(regions.add(memory.data(), static_cast<int64_t>(memory.size()), -1, 0, &region).ok());
    CHECK(LeaseTable::create(&leases).ok());
    CHECK(kvx::LeaseView::map(dup(leases->fd()), &view).ok());
  }

  LeaseRef grant(size_t block) {
    const auto offset = static_cast<int64_t>(block) * kBlockBytes;
    LeaseRef ref;
    kvx::LeaseTerms terms{
        .ttl_s = 100, .blocks = {{offset, 0, 1, kBlockBytes}}, .checksums = {}, .keys = {}};
    CHECK(leases->grant(regions.hold(region), std::move(terms), &ref).ok());
    return ref;
  }

  std::vector<uint8_t> memory = std::vector<uint8_t>(kBlocks * kBlockBytes);
  kvx::RegionTable regions;
  uint32_t region = 0;
  std::unique_ptr<LeaseTable> leases;
  std::shared_ptr<const kvx::LeaseView> view;
};

void test_revoke_waits_for_uses() {
  Bed bed;
  const LeaseRef ref = bed.grant(0);
  LeaseUse use;
  CHECK(bed.leases->use(ref, 1, kvx::kMayRead, &use).ok());
  std::atomic<bool> is_released{false};
  std::thread user([&] {
    while (use.is_live()) std::this_thread::yield();  // ends at once, seen from here and the page
    CHECK(!bed.view->is_live(ref.slot, ref.generation));
    LeaseUse late;
    CHECK(bed.leases->use(ref, 1, kvx::kMayRead, &late).code() == Code::kStale);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    is_released = true;
    use.release();
  });
  CHECK(bed.leases->revoke(ref.id, 30.0).ok());
  CHECK(is_released);
  user.join();
}

// Owners lease, revoke and then rewrite blocks; users write into what they have a use of. Were a
// use to outlive its revocation, ThreadSanitizer or the counter would see two at one block.
class Storm {
 public:
  void run(uint64_t seed) {
    std::vector<std::thread> threads;
    for (size_t i = 0; i < 2; ++i) threads.emplace_back([=, this] { own(seed + i, i); });
    for (size_t i = 0; i < 2; ++i) threads.emplace_back([=, this] { work(seed + 2 + i); });
    for (std::thread& thread : threads) thread.join();
    CHECK(bed_.leases->live() == 0 && bed_.leases->in_use() == 0);
    CHECK(bed_.regions.remove(bed_.region, 0).ok());
  }

 private:
  struct Place {
    std::mutex mutex;
    LeaseRef ref;
    std::atomic<int> users{0};
  };

  void own(uint64_t seed, size_t first) {
    std::mt19937_64 random(seed);
    for (int round = 0; round < 30'000 || uses_ < 30'000; ++round) {
      const size_t block = random() % (kBlocks / 2) * 2 + first;
      Place& place = places_[block];
      if (place.ref.id != 0) {
        CHECK(bed_.leases->revoke(place.ref.id, 30.0).ok());
        CHECK(place.users == 0);
        for (size_t at = 0; at < kBlockBytes; ++at) bed_.memory[block * kBlockBytes + at] = 1;
      }
      const LeaseRef fresh = bed_.grant(block);
      std::lock_guard lock(place.mutex);
      place.ref = fresh;
      if (round % 16 == 0) bed_.leases->sweep();
    }
    for (Place& place : places_) {
      std::lock_guard lock(place.mutex);
      CHECK(bed_.leases->revoke(place.ref.id, 30.0).ok());
    }
    ++owners_done_;
  }

  void work(uint64_t seed) {
    std::mt19937_64 random(seed);
    while (owners_done_ < 2) {
      const size_t block = random() % kBlocks;
      Place& place = places_[block];
      LeaseRef ref;
      {
        std::lock_guard lock(place.mutex);
        ref = place.ref;
      }
      LeaseUse use;
      if (!bed_.leases->use(ref, 1, kvx::kMayRead, &use).ok()) continue;
      ++place.users;
      ++uses_;
      uint64_t sum = 0;
      for (size_t at = 0; at < kBlockBytes; ++at) sum += bed_.memory[block * kBlockBytes + at];
      CHECK(sum == 0 || sum == kBlockBytes);
      --place.users;
    }
  }

  Bed bed_;
  std::array<Place, kBlocks> places_;
  std::atomic<int> owners_done_{0};
  std::atomic<int64_t> uses_{0};
};

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  test_revoke_waits_for_uses();
  Storm().run(seed);
  std::puts("lease threads: ok");
  return 0;
}
