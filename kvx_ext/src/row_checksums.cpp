#include "kvx/row_checksums.h"

#include <array>
#include <string>

#include "kvx/checksum.h"

namespace kvx {

namespace {

uint64_t checksum(const ChecksumKernel& kernel, const uint8_t* base, const Descriptor& block,
                  const uint8_t* key) {
  uint64_t state = block_seed(key, static_cast<uint64_t>(block.total()));
  for (int64_t row = 0; row < block.count; ++row) {
    const uint8_t* source = base + block.offset + row * block.stride;
    state = kernel.update(state, source, static_cast<size_t>(block.bytes));
  }
  return state;
}

}  // namespace

Status row_checksums(std::span<const uint8_t> memory, std::span<const Descriptor> blocks,
                     std::span<const uint8_t> keys, std::span<uint64_t> sums) {
  if (sums.size() != blocks.size() || (!keys.empty() && keys.size() != blocks.size() * kKeyBytes)) {
    return {Code::kUsage, std::to_string(blocks.size()) + " blocks need as many keys and sums"};
  }
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (validate(blocks.subspan(i, 1), static_cast<int64_t>(memory.size())).ok()) continue;
    return {Code::kUsage, "block " + std::to_string(i) + " does not lie within the " +
                              std::to_string(memory.size()) + " bytes of its memory"};
  }
  constexpr std::array<uint8_t, kKeyBytes> kNoKey{};
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  for (size_t i = 0; i < blocks.size(); ++i) {
    const uint8_t* key = keys.empty() ? kNoKey.data() : keys.data() + i * kKeyBytes;
    sums[i] = checksum(kernel, memory.data(), blocks[i], key);
  }
  return Status::Ok();
}

}  // namespace kvx
