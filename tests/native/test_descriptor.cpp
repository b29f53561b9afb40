// Descriptors against models that count byte by byte, or with numbers too wide to overflow.
// Usage: test_descriptor [seed]
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kvx/agent.h"
#include "kvx/checksum.h"
#include "kvx/descriptor.h"

namespace {

using kvx::Code;
using kvx::Descriptor;
using kvx::Run;

using Wide = __int128;
constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
constexpr int64_t kMin = std::numeric_limits<int64_t>::min();

// The definition, in numbers that hold every product of two others.
bool is_sound(const Descriptor& descriptor, int64_t region_bytes) {
  if (descriptor.count < 1 || descriptor.bytes < 1 || descriptor.offset < 0) return false;
  if (descriptor.count > 1 && descriptor.stride < descriptor.bytes) return false;
  const Wide last = descriptor.count > 1 ? Wide{descriptor.count - 1} * descriptor.stride : 0;
  return Wide{descriptor.offset} + last + descriptor.bytes <= region_bytes;
}

void test_hostile_values(std::mt19937_64& random) {
  const std::vector<int64_t> values = {
      kMin,  kMin + 1,  -1,        0,         1,        2,          3,
      64,    4096,      1 << 20,   kMax / 2,  kMax / 3, kMax,       kMax - 1,
      -4096, 1LL << 31, 1LL << 32, 1LL << 62, 100000,   100000 - 1, 100000 + 1};
  int64_t sound = 0;
  for (int round = 0; round < 500'000; ++round) {
    auto pick = [&] {
      const int64_t value = values[random() % values.size()];
      return value == kMax || random() % 4 != 0 ? value : value + 1;
    };
    const Descriptor descriptor{pick(), pick(), pick(), pick()};
    const int64_t region_bytes = pick();
    const bool expected = is_sound(descriptor, region_bytes);
    const kvx::Status status = kvx::validate({&descriptor, 1}, region_bytes);
    CHECK(status.ok() == expected);
    CHECK(expected || status.code() == Code::kUsage);
    if (!expected) continue;
    ++sound;
    // Only now may the header's own arithmetic be used, and it must not overflow (UBSan looks).
    CHECK(descriptor.total() > 0 && descriptor.total() <= region_bytes);
    CHECK(descriptor.end() <= region_bytes);
  }
  CHECK(sound > 1000);
}

// All of a small world: no byte outside, none twice.
void test_small_world() {
  constexpr int64_t kRegion = 6;
  for (int64_t offset = -1; offset <= 7; ++offset) {
    for (int64_t stride = -7; stride <= 7; ++stride) {
      for (int64_t count = -1; count <= 7; ++count) {
        for (int64_t bytes = -1; bytes <= 7; ++bytes) {
          bool expected = count > 0 && bytes > 0;
          std::vector<int> touched(kRegion);
          int64_t row_before = -1;
          for (int64_t row = 0; row < count && bytes > 0; ++row) {
            const int64_t begin = offset + (count > 1 ? row * stride : 0);
            expected = expected && begin > row_before;  // rows ascend
            row_before = begin;
            for (int64_t at = begin; at < begin + bytes; ++at) {
              const bool is_inside = at >= 0 && at < kRegion;
              expected = expected && is_inside && ++touched[static_cast<size_t>(at)] == 1;
            }
          }
          const Descriptor descriptor{offset, stride, count, bytes};
          CHECK(kvx::validate({&descriptor, 1}, kRegion).ok() == expected);
        }
      }
    }
  }
}

void test_first_defect_is_named() {
  std::vector<Descriptor> blocks(5, Descriptor{0, 16, 2, 8});
  CHECK(kvx::validate(blocks, 24).ok());
  blocks[3].offset = 1;
  blocks[4].bytes = 0;
  const kvx::Status status = kvx::validate(blocks, 24);
  CHECK(status.message().starts_with("descriptor 3 ends outside"));
  blocks.assign(static_cast<size_t>(kvx::kDescriptorsMax), Descriptor{0, 0, 1, 1});
  CHECK(kvx::validate(blocks, 1).ok());
  blocks.push_back(blocks[0]);
  CHECK(kvx::validate(blocks, 1).code() == Code::kUsage);
}

void test_fit() {
  const std::vector<Descriptor> local = {{0, 16, 4, 8}, {64, 0, 1, 6}};
  std::vector<Descriptor> remote = {{0, 0, 1, 32}, {64, 2, 3, 2}};
  CHECK(kvx::validate_fit(local, remote).ok());
  remote[1].bytes = 1;
  CHECK(kvx::validate_fit(local, remote).message().starts_with("descriptor 1 has 6 bytes here"));
  remote[1] = {0, 0, kMax, kMax};
  CHECK(kvx::validate_fit(local, remote).code() == Code::kUsage);
  remote[1] = {0, 0, kMin, -1};
  CHECK(kvx::validate_fit(local, remote).code() == Code::kUsage);
  remote.pop_back();
  CHECK(kvx::validate_fit(local, remote).code() == Code::kUsage);
}

struct Byte {
  int64_t offset;
  int64_t block;
  int64_t in_block;
  bool begins_row;
};

std::vector<Byte> bytes_of(const std::vector<Descriptor>& blocks) {
  std::vector<Byte> bytes;
  for (size_t block = 0; block < blocks.size(); ++block) {
    int64_t in_block = 0;
    for (int64_t row = 0; row < blocks[block].count; ++row) {
      for (int64_t at = 0; at < blocks[block].bytes; ++at, ++in_block) {
        bytes.push_back({blocks[block].offset + row * blocks[block].stride + at,
                         static_cast<int64_t>(block), in_block, at == 0});
      }
    }
  }
  return bytes;
}

void test_cursor(std::mt19937_64& random) {
  for (int round = 0; round < 20'000; ++round) {
    std::vector<Descriptor> blocks;
    for (uint64_t left = random() % 5; left > 0; --left) {
      const auto bytes = static_cast<int64_t>(1 + random() % 9);
      const auto stride = bytes + static_cast<int64_t>(random() % 4);
      blocks.push_back({static_cast<int64_t>(random() % 50), stride,
                        static_cast<int64_t>(1 + random() % 4), bytes});
    }
    const std::vector<Byte> model = bytes_of(blocks);
    kvx::RowCursor cursor(blocks);
    for (size_t at = 0; at < model.size();) {
      CHECK(!cursor.is_at_end());
      CHECK(cursor.block() == model[at].block && cursor.done_in_block() == model[at].in_block);
      const auto bytes_max = static_cast<int64_t>(1 + random() % 12);
      const Run run = cursor.next(bytes_max);
      CHECK(run.bytes > 0 && run.bytes <= bytes_max);
      for (int64_t i = 0; i < run.bytes; ++i, ++at) {
        CHECK(at < model.size() && model[at].offset == run.offset + i);
        CHECK(i == 0 || !model[at].begins_row);
      }
      // As much as it may be.
      const bool is_row_over = at == model.size() || model[at].begins_row;
      CHECK(run.bytes == bytes_max || is_row_over);
    }
    CHECK(cursor.is_at_end() && cursor.next(1).bytes == 0 && cursor.done_in_block() == 0);
    CHECK(cursor.block() == static_cast<int64_t>(blocks.size()));
  }
}

void test_plan() {
  auto fresh = [&] {
    kvx::RemotePlan plan;
    plan.local = {{0, 100, 2, 50}, {500, 0, 1, 10}};
    plan.remote = {{1LL << 40, 0, 1, 100}, {0, 5, 2, 5}};
    return plan;
  };
  kvx::RemotePlan plan = fresh();
  CHECK(kvx::finish_plan(&plan, 1000).ok() && plan.total_bytes == 110);
  plan.indices = {7, 8};
  plan.checksums = {1, 2};
  plan.keys.resize(2 * kvx::kKeyBytes);
  CHECK(kvx::finish_plan(&plan, 1000).ok());
  auto is_refused = [](kvx::RemotePlan bad) {
    return kvx::finish_plan(&bad, 1000).code() == Code::kUsage;
  };
  auto with = [&](auto change) {
    kvx::RemotePlan changed = fresh();
    change(changed);
    return changed;
  };
  CHECK(!is_refused(fresh()));
  CHECK(is_refused(with([](kvx::RemotePlan& bad) { bad.indices = {1}; })));
  CHECK(is_refused(with([](kvx::RemotePlan& bad) { bad.checksums = {1, 2, 3}; })));
  CHECK(is_refused(with([](kvx::RemotePlan& bad) { bad.keys.resize(2); })));
  CHECK(is_refused(with([](kvx::RemotePlan& bad) { bad.local[1].offset = 991; })));
  CHECK(is_refused(with([](kvx::RemotePlan& bad) { bad.remote[0].offset = kMax - 10; })));
  CHECK(is_refused(with([](kvx::RemotePlan& bad) { bad.remote[0].bytes = 99; })));
  CHECK(is_refused(with([](kvx::RemotePlan& bad) { bad.local.clear(), bad.remote.clear(); })));
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device()();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  test_hostile_values(random);
  test_small_world();
  test_first_defect_is_named();
  test_fit();
  test_cursor(random);
  test_plan();
  std::puts("descriptor: ok");
  return 0;
}
