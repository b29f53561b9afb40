// Threads on one index: writers, readers that pin, removers, a flusher and a sweeper; at the end
// nothing is held and every invariant stands. Run under ThreadSanitizer it also checks the locking.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "kvx/block_index.h"

namespace {

using kvx::BlockIndex;
using kvx::BlockKey;

constexpr size_t kBatch = 32;
constexpr int64_t kSlots = 512;
constexpr uint64_t kKeys = 2048;

struct Rows {
  std::vector<BlockKey> keys = std::vector<BlockKey>(kBatch);
  std::vector<uint8_t> flags = std::vector<uint8_t>(kBatch);
  std::vector<int64_t> slots = std::vector<int64_t>(kBatch);
  std::vector<uint32_t> generations = std::vector<uint32_t>(kBatch);
  std::vector<uint64_t> checksums = std::vector<uint64_t>(kBatch);
  kvx::References references(size_t count) const {
    return {std::span(slots).first(count), std::span(generations).first(count)};
  }
  kvx::Places places() { return {slots, generations, checksums}; }
};

uint64_t number_of(const BlockKey& key) {
  uint64_t number;
  std::memcpy(&number, key.bytes.data(), sizeof(number));
  return number;
}

void draw(std::mt19937_64& random, Rows& rows) {
  const uint64_t first = random() % kKeys;
  for (size_t i = 0; i < kBatch; ++i) {
    const uint64_t number = (first + i) % kKeys;
    std::memcpy(rows.keys[i].bytes.data(), &number, sizeof(number));
  }
}

void write(BlockIndex& index, std::mt19937_64& random, uint64_t now_ms) {
  Rows rows;
  draw(random, rows);
  kvx::Removed evicted;
  const kvx::WriteOptions options{static_cast<int32_t>(random() % 3), random() % 4 == 0,
                                  random() % 4 == 0 ? 1U : 0U, now_ms};
  CHECK(index.reserve(rows.keys, options, rows.flags, rows.slots, rows.generations, &evicted).ok());
  Rows kept;
  size_t count = 0;
  for (size_t i = 0; i < kBatch; ++i) {
    if (rows.flags[i] != static_cast<uint8_t>(kvx::ReserveOutcome::kReserved)) continue;
    kept.slots[count] = rows.slots[i];
    kept.generations[count] = rows.generations[i];
    kept.checksums[count++] = number_of(rows.keys[i]);
  }
  const auto flags = std::span(kept.flags).first(count);
  if (random() % 8 == 0) {
    index.abort(kept.references(count), flags);
  } else {
    index.commit(kept.references(count), std::span(kept.checksums).first(count), flags);
  }
}

void read(BlockIndex& index, std::mt19937_64& random, uint64_t now_ms) {
  Rows rows;
  draw(random, rows);
  int64_t count = 0;
  CHECK(index.match(rows.keys, {now_ms, true, true}, rows.places(), &count).ok());
  const auto found = static_cast<size_t>(count);
  const auto flags = std::span(rows.flags).first(found);
  for (size_t i = 0; i < found; ++i) CHECK(rows.checksums[i] == number_of(rows.keys[i]));
  std::this_thread::yield();
  // A pinned block stays readable whatever the others do.
  index.validate(std::span(rows.keys).first(found), rows.references(found), flags);
  for (const uint8_t is_live : flags) CHECK(is_live == 1);
  int64_t lease_id = 0;
  const bool is_leased = index.lease(rows.references(found), now_ms + 1, &lease_id).ok();
  index.unpin(rows.references(found), flags);
  for (const uint8_t is_done : flags) CHECK(is_done == 1);
  if (is_leased && random() % 2 == 0) index.release(lease_id);
}

void keep_house(BlockIndex& index, std::mt19937_64& random, uint64_t now_ms) {
  Rows rows;
  const auto taken = static_cast<size_t>(index.take_dirty(rows.keys, rows.places()));
  const auto flags = std::span(rows.flags).first(taken);
  if (random() % 4 != 0) index.mark_clean(rows.references(taken), flags);
  index.unpin(rows.references(taken), flags);
  (void)index.expire(now_ms, 64);
  kvx::Removed evicted;
  CHECK(index.set_owner_limit(1, static_cast<int64_t>(random() % 200) + 50, &evicted).ok());
  if (random() % 8 == 0) {
    draw(random, rows);
    (void)index.remove(rows.keys, kvx::RemovalReason::kDropped);
  }
  bool is_retired = false;
  CHECK(index.retire_slots(kSlots - 16, 16, &is_retired, &evicted).ok());
  if (is_retired) CHECK(index.add_slots(kSlots - 16, 16).ok());
  if (random() % 16 == 0) CHECK(index.check_integrity().ok());
}

void run(kvx::EvictionPolicy policy, uint64_t seed, int rounds) {
  std::shared_ptr<kvx::MissHistory> history;
  CHECK(kvx::MissHistory::create(4096, &history).ok());
  BlockIndex index(policy, history);
  CHECK(index.add_slots(0, kSlots).ok());
  std::atomic<uint64_t> now_ms{1};
  auto work = [&](uint64_t number, auto step) {
    std::mt19937_64 random(seed * 100 + number);
    for (int i = 0; i < rounds; ++i) step(index, random, now_ms.fetch_add(1));
  };
  std::vector<std::thread> threads;
  threads.emplace_back(work, 1, write);
  threads.emplace_back(work, 2, write);
  threads.emplace_back(work, 3, read);
  threads.emplace_back(work, 4, read);
  threads.emplace_back(work, 5, keep_house);
  for (std::thread& thread : threads) thread.join();

  (void)index.expire(now_ms.load() + 10, 0);
  const kvx::Status status = index.check_integrity();
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  CHECK(status.ok());
  const kvx::IndexStats stats = index.stats();
  CHECK(stats.pinned == 0 && stats.reserved == 0 && stats.doomed == 0 && stats.leases == 0);
  CHECK(stats.evicted > 0 && stats.hits > 0);
  (void)index.clear();
  CHECK(index.stats().slots_free == kSlots);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 2000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("seed %llu, %d rounds a thread\n", static_cast<unsigned long long>(seed), rounds);
  for (uint8_t policy = 0; policy <= static_cast<uint8_t>(kvx::EvictionPolicy::kS3Fifo); ++policy) {
    run(static_cast<kvx::EvictionPolicy>(policy), seed, rounds);
  }
  return 0;
}
