// Blocks into a body and out of it against memcpy; what does not fit is refused untouched.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "kvx/body_copy.h"
#include "kvx/checksum.h"
#include "kvx/copy.h"

namespace {

struct Group {
  std::vector<std::vector<uint8_t>> blocks;
  std::vector<int64_t> addresses;
  std::vector<int64_t> offsets;
  std::vector<uint8_t> keys;
  int64_t block_bytes;
  size_t body_bytes = 0;

  // Blocks at places of any alignment, with gaps, in no order.
  Group(std::mt19937_64& random, size_t count, int64_t bytes) : block_bytes(bytes) {
    for (size_t i = 0; i < count; ++i) {
      blocks.emplace_back(static_cast<size_t>(bytes));
      for (uint8_t& byte : blocks.back()) byte = static_cast<uint8_t>(random());
      body_bytes += random() % 100;
      offsets.push_back(static_cast<int64_t>(body_bytes));
      body_bytes += static_cast<size_t>(bytes);
      for (size_t k = 0; k < kvx::kKeyBytes; ++k) keys.push_back(static_cast<uint8_t>(random()));
    }
    std::shuffle(offsets.begin(), offsets.end(), random);
    for (std::vector<uint8_t>& block : blocks) {
      addresses.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(block.data())));
    }
  }

  kvx::BodyBlocks view() const { return {offsets, addresses, keys, block_bytes}; }

  uint64_t checksum(size_t i) const {
    const auto bytes = static_cast<uint64_t>(block_bytes);
    const uint64_t seed = kvx::block_seed(&keys[i * kvx::kKeyBytes], bytes);
    return kvx::checksum_block(blocks[i].data(), block_bytes, seed);
  }
};

void test_there_and_back(std::mt19937_64& random) {
  for (int round = 0; round < 200; ++round) {
    Group group(random, random() % 7, static_cast<int64_t>(1 + random() % 9000));
    const size_t count = group.blocks.size();
    std::vector<uint8_t> body(group.body_bytes, 0xee);
    std::vector<uint8_t> expected = body;
    std::vector<uint64_t> sums(count);
    CHECK(kvx::gather_into_body(group.view(), body, sums).ok());
    const auto bytes = static_cast<size_t>(group.block_bytes);
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(&expected[static_cast<size_t>(group.offsets[i])], group.blocks[i].data(), bytes);
      CHECK(sums[i] == group.checksum(i));
    }
    CHECK(body == expected);
    const std::vector<std::vector<uint8_t>> blocks = group.blocks;
    for (std::vector<uint8_t>& block : group.blocks) std::fill(block.begin(), block.end(), 0);
    std::vector<uint64_t> again(count);
    CHECK(kvx::scatter_from_body(group.view(), body, again).ok());
    CHECK(again == sums);
    CHECK(group.blocks == blocks);
  }
}

void test_what_does_not_fit_is_refused(std::mt19937_64& random) {
  Group group(random, 3, 500);
  std::vector<uint8_t> body(group.body_bytes, 0xee);
  std::vector<uint64_t> sums(3);
  const auto refuses = [&](const kvx::BodyBlocks& blocks, size_t num_sums) {
    const std::vector<uint8_t> before = body;
    const std::span<uint64_t> room(sums.data(), num_sums);
    CHECK(kvx::gather_into_body(blocks, body, room).code() == kvx::Code::kUsage);
    CHECK(kvx::scatter_from_body(blocks, body, room).code() == kvx::Code::kUsage);
    CHECK(body == before);
  };
  refuses(group.view(), 2);
  for (int64_t bytes : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::max()}) {
    kvx::BodyBlocks blocks = group.view();
    blocks.block_bytes = bytes;
    refuses(blocks, 3);
  }
  const auto last = static_cast<int64_t>(body.size()) - 499;
  for (int64_t offset : {int64_t{-1}, last, std::numeric_limits<int64_t>::max(),
                         std::numeric_limits<int64_t>::min()}) {
    Group other = group;
    other.offsets[2] = offset;
    refuses(other.view(), 3);
  }
  Group nowhere = group;
  nowhere.addresses[1] = 0;
  refuses(nowhere.view(), 3);
  Group keyless = group;
  keyless.keys.pop_back();
  refuses(keyless.view(), 3);
}

}  // namespace

int main() {
  std::mt19937_64 random(20240608);
  test_there_and_back(random);
  test_what_does_not_fit_is_refused(random);
  std::puts("body_copy: ok");
  return 0;
}
