#include "kvx/body_copy.h"

#include <string>

#include "kvx/checksum.h"

namespace kvx {

namespace {

Status check(const BodyBlocks& blocks, size_t body_bytes, size_t num_sums) {
  const size_t count = blocks.offsets.size();
  if (blocks.addresses.size() != count || blocks.keys.size() != count * kKeyBytes ||
      num_sums != count) {
    return {Code::kUsage, std::to_string(count) + " offsets need as many addresses and keys"};
  }
  if (blocks.block_bytes < 1) {
    return {Code::kUsage, "blocks of " + std::to_string(blocks.block_bytes) + " bytes"};
  }
  for (size_t i = 0; i < count; ++i) {
    const int64_t offset = blocks.offsets[i];
    const auto bytes = static_cast<int64_t>(body_bytes);
    // Not the sum of both: it could overflow.
    if (offset < 0 || blocks.block_bytes > bytes || offset > bytes - blocks.block_bytes) {
      return {Code::kUsage, "block " + std::to_string(i) + ": " +
                                std::to_string(blocks.block_bytes) + " bytes at " +
                                std::to_string(offset) + " do not lie within a body of " +
                                std::to_string(bytes)};
    }
    if (blocks.addresses[i] == 0) {
      return {Code::kUsage, "block " + std::to_string(i) + " has no address"};
    }
  }
  return Status::Ok();
}

uint8_t* memory_of(const BodyBlocks& blocks, size_t i) {
  return reinterpret_cast<uint8_t*>(static_cast<uintptr_t>(blocks.addresses[i]));
}

uint64_t seed_of(const BodyBlocks& blocks, size_t i) {
  return block_seed(blocks.keys.data() + i * kKeyBytes, static_cast<uint64_t>(blocks.block_bytes));
}

}  // namespace

Status gather_into_body(const BodyBlocks& blocks, std::span<uint8_t> body,
                        std::span<uint64_t> sums) {
  if (Status status = check(blocks, body.size(), sums.size()); !status.ok()) return status;
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  const auto bytes = static_cast<size_t>(blocks.block_bytes);
  for (size_t i = 0; i < sums.size(); ++i) {
    uint8_t* target = body.data() + blocks.offsets[i];
    sums[i] =
        kernel.copy(seed_of(blocks, i), target, memory_of(blocks, i), bytes, Stores::kStreaming);
  }
  return Status::Ok();
}

Status scatter_from_body(const BodyBlocks& blocks, std::span<const uint8_t> body,
                         std::span<uint64_t> sums) {
  if (Status status = check(blocks, body.size(), sums.size()); !status.ok()) return status;
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  const auto bytes = static_cast<size_t>(blocks.block_bytes);
  for (size_t i = 0; i < sums.size(); ++i) {
    const uint8_t* source = body.data() + blocks.offsets[i];
    sums[i] =
        kernel.copy(seed_of(blocks, i), memory_of(blocks, i), source, bytes, Stores::kStreaming);
  }
  return Status::Ok();
}

}  // namespace kvx
