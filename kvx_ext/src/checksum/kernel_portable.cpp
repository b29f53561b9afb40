#include "crc64.h"
#include "kernels.h"

namespace kvx::crc64 {
namespace {

// Checksums a piece right after copying it, while it is still in the first-level cache.
constexpr size_t kPieceBytes = 4096;

uint64_t copy(uint64_t state, uint8_t* target, const uint8_t* source, size_t bytes, Stores) {
  while (bytes > 0) {
    const size_t piece = bytes < kPieceBytes ? bytes : kPieceBytes;
    std::memcpy(target, source, piece);
    state = update_sliced(state, source, piece);
    target += piece;
    source += piece;
    bytes -= piece;
  }
  return state;
}

void copy_only(uint8_t* target, const uint8_t* source, size_t bytes, Stores) {
  std::memcpy(target, source, bytes);
}

}  // namespace

const ChecksumKernel kPortableKernel = {"portable", update_sliced, copy, copy_only};

}  // namespace kvx::crc64
