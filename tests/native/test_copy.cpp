// Every checksum kernel against a bitwise CRC-64/NVME, and gather/scatter against a plain loop.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "check.h"
#include "kvx/checksum.h"
#include "kvx/copy.h"

namespace {

// The definition, one bit at a time: nothing shared with the kernels but the polynomial.
uint64_t bitwise_crc(uint64_t state, const uint8_t* source, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    state ^= source[i];
    for (int bit = 0; bit < 8; ++bit) {
      state = (state >> 1) ^ ((state & 1) != 0 ? 0x9a6c9329ac4bc9b5 : 0);
    }
  }
  return state;
}

std::vector<uint8_t> random_bytes(std::mt19937_64& random, size_t count) {
  std::vector<uint8_t> bytes(count);
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
  return bytes;
}

void test_check_value() {
  const char* digits = "123456789";
  const auto* source = reinterpret_cast<const uint8_t*>(digits);
  for (const kvx::ChecksumKernel& kernel : kvx::checksum_kernels()) {
    CHECK(~kernel.update(~uint64_t{0}, source, 9) == 0xae8b14860a799888);
  }
}

// Sizes around every boundary of the folding loops, at every misalignment of both sides.
void test_kernels_agree(std::mt19937_64& random) {
  const std::vector<uint8_t> source = random_bytes(random, 5000);
  std::vector<uint8_t> target(source.size() + 256);
  for (const kvx::ChecksumKernel& kernel : kvx::checksum_kernels()) {
    for (size_t round = 0; round < 600; ++round) {
      const size_t skip = random() % 70;
      const size_t bytes = round < 300 ? round : random() % (source.size() - skip);
      const size_t place = random() % 70;
      const uint64_t seed = random();
      const uint64_t expected = bitwise_crc(seed, source.data() + skip, bytes);
      CHECK(kernel.update(seed, source.data() + skip, bytes) == expected);
      for (kvx::Stores stores : {kvx::Stores::kCached, kvx::Stores::kStreaming}) {
        std::fill(target.begin(), target.end(), uint8_t{0xee});
        const uint8_t* from = source.data() + skip;
        CHECK(kernel.copy(seed, target.data() + place, from, bytes, stores) == expected);
        CHECK(std::memcmp(target.data() + place, from, bytes) == 0);
        CHECK(place == 0 || target[place - 1] == 0xee);
        CHECK(target[place + bytes] == 0xee);
      }
    }
  }
}

void test_every_bit_counts(std::mt19937_64& random) {
  std::vector<uint8_t> block = random_bytes(random, 1031);
  const uint64_t good = kvx::checksum_block(block.data(), 1031, 7);
  for (size_t bit = 0; bit < block.size() * 8; ++bit) {
    block[bit / 8] ^= static_cast<uint8_t>(1 << (bit % 8));
    CHECK(kvx::checksum_block(block.data(), 1031, 7) != good);
    block[bit / 8] ^= static_cast<uint8_t>(1 << (bit % 8));
  }
}

void test_seed_binds_key_and_length() {
  uint8_t key[kvx::kKeyBytes] = {};
  const uint64_t seed = kvx::block_seed(key, 4096);
  CHECK(kvx::block_seed(key, 4097) != seed);
  for (size_t bit = 0; bit < 128; ++bit) {
    key[bit / 8] ^= static_cast<uint8_t>(1 << (bit % 8));
    CHECK(kvx::block_seed(key, 4096) != seed);
    key[bit / 8] ^= static_cast<uint8_t>(1 << (bit % 8));
  }
}

// Layer-first planes of odd sizes: through the canonical form and back into other planes.
void test_gather_and_scatter(std::mt19937_64& random) {
  constexpr int64_t kBlocks = 5;
  for (int round = 0; round < 200; ++round) {
    const size_t count = 1 + random() % 6;
    std::vector<std::vector<uint8_t>> memory;
    std::vector<std::vector<uint8_t>> copies;
    std::vector<kvx::Plane> planes;
    std::vector<kvx::Plane> copied;
    for (size_t i = 0; i < count; ++i) {
      const auto bytes = static_cast<int64_t>(1 + random() % 3000);
      const int64_t stride = bytes + static_cast<int64_t>(random() % 100);
      memory.push_back(random_bytes(random, static_cast<size_t>(stride * kBlocks)));
      copies.emplace_back(memory.back().size());
      planes.push_back({memory.back().data(), stride, bytes});
      copied.push_back({copies.back().data(), stride, bytes});
    }
    const kvx::PlaneSet source(planes);
    const kvx::PlaneSet target(copied);
    const auto block = static_cast<int64_t>(random() % kBlocks);
    std::vector<uint8_t> canonical(static_cast<size_t>(source.block_bytes()));
    const uint64_t sum = kvx::gather_block(source, block, canonical.data(), 99);
    CHECK(sum == bitwise_crc(99, canonical.data(), canonical.size()));
    CHECK(kvx::scatter_block(canonical.data(), target, block, 99) == sum);
    for (size_t i = 0; i < count; ++i) {
      const auto at = static_cast<size_t>(block * planes[i].stride);
      CHECK(std::memcmp(&memory[i][at], &copies[i][at], static_cast<size_t>(planes[i].bytes)) == 0);
    }
    kvx::poison_block(target, block);
    CHECK(copies[0][static_cast<size_t>(block * planes[0].stride)] == 0xff);
  }
}

void test_touching_planes_merge() {
  std::vector<uint8_t> memory(4096);
  const std::vector<kvx::Plane> planes = {
      {memory.data(), 1024, 256}, {memory.data() + 256, 1024, 256}, {memory.data() + 768, 1024, 8}};
  const kvx::PlaneSet merged(planes);
  CHECK(merged.planes().size() == 2);
  CHECK(merged.planes()[0].bytes == 512);
  CHECK(merged.block_bytes() == 520);
}

}  // namespace

int main() {
  std::mt19937_64 random(20240607);
  test_check_value();
  test_kernels_agree(random);
  test_every_bit_counts(random);
  test_seed_binds_key_and_length();
  test_gather_and_scatter(random);
  test_touching_planes_merge();
  std::puts("copy: ok");
  return 0;
}
