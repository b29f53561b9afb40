// Runs of blocks against a model that goes byte by byte. Usage: test_block_runs [seed]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "check.h"
#include "kvx/block_runs.h"

namespace {

using kvx::CopyRuns;
using kvx::Descriptor;

// Offsets of a block's canonical bytes.
std::vector<int64_t> bytes_of(const Descriptor& block) {
  std::vector<int64_t> offsets;
  for (int64_t row = 0; row < block.count; ++row) {
    for (int64_t at = 0; at < block.bytes; ++at) {
      offsets.push_back(block.offset + row * block.stride + at);
    }
  }
  return offsets;
}

// A block of so many bytes in rows of a size that divides them.
Descriptor block_of(std::mt19937_64& random, int64_t total) {
  std::vector<int64_t> sizes;
  for (int64_t size = 1; size <= total; ++size) {
    if (total % size == 0) sizes.push_back(size);
  }
  const int64_t bytes = sizes[random() % sizes.size()];
  const auto gap = static_cast<int64_t>(random() % 5);
  return {static_cast<int64_t>(random() % 500), bytes + gap, total / bytes, bytes};
}

void test_runs_are_the_bytes(std::mt19937_64& random) {
  for (int round = 0; round < 2000; ++round) {
    std::vector<Descriptor> targets;
    std::vector<Descriptor> sources;
    const size_t count = random() % 6;
    for (size_t i = 0; i < count; ++i) {
      const auto total = static_cast<int64_t>(random() % 48 + 1);
      targets.push_back(block_of(random, total));
      sources.push_back(block_of(random, total));
    }
    std::vector<std::pair<uint64_t, uint64_t>> expected;
    for (size_t i = 0; i < count; ++i) {
      const auto target = bytes_of(targets[i]);
      const auto source = bytes_of(sources[i]);
      for (size_t at = 0; at < target.size(); ++at) {
        expected.emplace_back(1000 + target[at], 90000 + source[at]);
      }
    }
    CopyRuns runs;
    CHECK(kvx::pair_blocks(targets, 1000, sources, 90000, &runs).ok());
    std::vector<std::pair<uint64_t, uint64_t>> found;
    for (size_t i = 0; i < runs.size(); ++i) {
      CHECK(runs.bytes[i] > 0);
      for (size_t at = 0; at < runs.bytes[i]; ++at) {
        found.emplace_back(runs.targets[i] + at, runs.sources[i] + at);
      }
    }
    CHECK(found == expected);
  }
}

void test_other_sizes_are_refused() {
  CopyRuns runs;
  const std::vector<Descriptor> one{{0, 0, 1, 8}};
  const std::vector<Descriptor> other{{0, 0, 1, 9}};
  CHECK(kvx::pair_blocks(one, 0, other, 0, &runs).code() == kvx::Code::kUsage);
  CHECK(kvx::pair_blocks(one, 0, {}, 0, &runs).code() == kvx::Code::kUsage);
}

void test_overlaps(std::mt19937_64& random) {
  int overlapping = 0;
  for (int round = 0; round < 4000; ++round) {
    std::vector<Descriptor> blocks;
    std::map<int64_t, size_t> owner;
    bool is_overlapping = false;
    const size_t count = random() % 5;
    for (size_t i = 0; i < count; ++i) {
      blocks.push_back(block_of(random, static_cast<int64_t>(random() % 40 + 1)));
      for (const int64_t at : bytes_of(blocks[i])) is_overlapping |= !owner.emplace(at, i).second;
    }
    const int64_t found = kvx::find_overlap(blocks);
    CHECK((found >= 0) == is_overlapping);
    overlapping += is_overlapping ? 1 : 0;
    if (found < 0) continue;
    // It has bytes in common with another one.
    const auto named = bytes_of(blocks[static_cast<size_t>(found)]);
    bool is_right = false;
    for (size_t i = 0; i < count; ++i) {
      if (i == static_cast<size_t>(found)) continue;
      for (const int64_t at : bytes_of(blocks[i])) {
        is_right |= std::find(named.begin(), named.end(), at) != named.end();
      }
    }
    CHECK(is_right);
  }
  CHECK(overlapping > 100 && overlapping < 3900);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  test_runs_are_the_bytes(random);
  test_other_sizes_are_refused();
  test_overlaps(random);
}
