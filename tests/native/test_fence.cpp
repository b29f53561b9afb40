// Do generations fence off readers without pins? A simulated reader takes a reference, copies the
// block in small steps, and validates before and after; between its steps blocks are evicted and
// their slots reserved, overwritten and committed for other keys. No copy that was validated may
// hold a byte of another block. The same run without the generation in the check must find some
// that do: the test can fail.
//
// One thread plays every interleaving from a seed, so that a failure repeats.
// Usage: test_fence [interleavings] [seed]
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "check.h"
#include "kvx/block_index.h"

namespace {

using kvx::BlockIndex;
using kvx::BlockKey;

constexpr size_t kSlots = 4;
constexpr size_t kKeys = 6;
constexpr size_t kSteps = 4;  // a block's bytes are copied and written in so many pieces

using Bytes = std::array<uint64_t, kSteps>;

BlockKey key_of(uint64_t number) {
  BlockKey key;
  std::memcpy(key.bytes.data(), &number, sizeof(number));
  return key;
}

// Every write of a key has bytes of its own: the same key rewritten is another block.
uint64_t content(uint64_t key, uint64_t version) { return key << 48 | version; }

struct Counts {
  int64_t served = 0;
  int64_t refused = 0;
  int64_t wrong = 0;
};

// `kFenced` false leaves the generation out of the second look, as a naive cache would.
template <bool kFenced>
class Simulation {
 public:
  explicit Simulation(uint64_t seed) : random_(seed), index_(kvx::EvictionPolicy::kLru, nullptr) {
    CHECK(index_.add_slots(0, kSlots).ok());
  }

  void step() {
    switch (random_() % 4) {
      case 0:
        write();
        break;
      case 1:
        remove();
        break;
      default:
        read();
    }
  }

  const Counts& counts() const { return counts_; }

 private:
  struct Reader {
    bool is_active = false;
    BlockKey key;
    int64_t slot = 0;
    uint32_t generation = 0;
    uint64_t expected = 0;
    size_t copied = 0;
    Bytes copy{};
  };
  struct Writer {
    bool is_active = false;
    int64_t slot = 0;
    uint32_t generation = 0;
    uint64_t key = 0;
    uint64_t version = 0;
    size_t written = 0;
  };

  void write() {
    if (!writer_.is_active) {
      begin_write();
      return;
    }
    memory_[static_cast<size_t>(writer_.slot)][writer_.written] =
        content(writer_.key, writer_.version);
    if (++writer_.written < kSteps) return;
    const uint64_t checksum = content(writer_.key, writer_.version);
    uint8_t is_done = 0;
    index_.commit({{&writer_.slot, 1}, {&writer_.generation, 1}}, {&checksum, 1}, {&is_done, 1});
    writer_.is_active = false;
  }

  void begin_write() {
    const uint64_t number = random_() % kKeys;
    const BlockKey key = key_of(number);
    uint8_t outcome = 0;
    kvx::Removed evicted;
    CHECK(index_
              .reserve({&key, 1}, {}, {&outcome, 1}, {&writer_.slot, 1}, {&writer_.generation, 1},
                       &evicted)
              .ok());
    if (outcome != static_cast<uint8_t>(kvx::ReserveOutcome::kReserved)) return;
    writer_ = {true, writer_.slot, writer_.generation, number, ++versions_, 0};
  }

  void remove() {
    if (random_() % 4 != 0) return;
    const BlockKey key = key_of(random_() % kKeys);
    (void)index_.remove({&key, 1}, kvx::RemovalReason::kDropped);
  }

  void read() {
    if (!reader_.is_active) {
      begin_read();
      return;
    }
    reader_.copy[reader_.copied] = memory_[static_cast<size_t>(reader_.slot)][reader_.copied];
    if (++reader_.copied < kSteps) return;
    reader_.is_active = false;
    if (!is_valid()) {
      ++counts_.refused;
      return;
    }
    ++counts_.served;
    for (const uint64_t word : reader_.copy) {
      if (word == reader_.expected) continue;
      ++counts_.wrong;
      return;
    }
  }

  void begin_read() {
    reader_.key = key_of(random_() % kKeys);
    uint8_t is_found = 0;
    CHECK(index_
              .lookup({&reader_.key, 1}, {}, {&is_found, 1},
                      {{&reader_.slot, 1}, {&reader_.generation, 1}, {&reader_.expected, 1}})
              .ok());
    reader_.copied = 0;
    reader_.is_active = is_found != 0 && is_valid();
  }

  bool is_valid() {
    uint8_t is_live = 0;
    if constexpr (kFenced) {
      index_.validate({&reader_.key, 1}, {{&reader_.slot, 1}, {&reader_.generation, 1}},
                      {&is_live, 1});
      return is_live != 0;
    }
    int64_t slot;
    uint32_t generation;
    uint64_t checksum;
    CHECK(index_
              .lookup({&reader_.key, 1}, {}, {&is_live, 1},
                      {{&slot, 1}, {&generation, 1}, {&checksum, 1}})
              .ok());
    return is_live != 0 && slot == reader_.slot;
  }

  std::mt19937_64 random_;
  BlockIndex index_;
  std::array<Bytes, kSlots> memory_{};
  Reader reader_;
  Writer writer_;
  uint64_t versions_ = 0;
  Counts counts_;
};

template <bool kFenced>
Counts simulate(uint64_t seed, int64_t interleavings) {
  Simulation<kFenced> simulation(seed);
  int64_t steps = 0;
  while (simulation.counts().served + simulation.counts().refused < interleavings) {
    simulation.step();
    CHECK(++steps < 1000 * (interleavings + 100));
  }
  const Counts& counts = simulation.counts();
  std::printf("%s: %lld served, %lld refused, %lld wrong\n",
              kFenced ? "with generations" : "without", static_cast<long long>(counts.served),
              static_cast<long long>(counts.refused), static_cast<long long>(counts.wrong));
  return counts;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t interleavings = argc > 1 ? std::atoll(argv[1]) : 1'000'000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("seed %llu, %lld interleavings\n", static_cast<unsigned long long>(seed),
              static_cast<long long>(interleavings));
  const Counts fenced = simulate<true>(seed, interleavings);
  CHECK(fenced.wrong == 0 && fenced.served > 0 && fenced.refused > 0);
  const Counts unfenced = simulate<false>(seed, std::max<int64_t>(interleavings / 10, 200'000));
  CHECK(unfenced.wrong > 0);
  return 0;
}
