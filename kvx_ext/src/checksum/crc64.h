// CRC-64/NVME arithmetic shared by all kernels, in the reflected bit order: bit 63 of a word is
// the coefficient of x^0. `state` is the bare register; seeding it is the caller's affair.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace kvx::crc64 {

inline constexpr uint64_t kPolynomial = 0x9a6c9329ac4bc9b5;  // reflected

// x^power mod P, the constant that carries a register over `power` bits.
constexpr uint64_t power_of_x(int power) {
  uint64_t value = uint64_t{1} << 63;
  for (int i = 0; i < power; ++i) value = (value >> 1) ^ ((value & 1) ? kPolynomial : 0);
  return value;
}

// Constants that fold a 128-bit lane forward over `bits` bits. A carry-less product of reflected
// words comes out one bit low, hence the - 1.
struct FoldConstants {
  uint64_t low;  // for the half that holds the earlier bytes
  uint64_t high;
};
constexpr FoldConstants fold_over(int bits) {
  return {power_of_x(bits + 64 - 1), power_of_x(bits - 1)};
}

using Tables = std::array<std::array<uint64_t, 256>, 8>;

constexpr Tables make_tables() {
  Tables tables{};
  for (size_t byte = 0; byte < 256; ++byte) {
    uint64_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) ? kPolynomial : 0);
    tables[0][byte] = value;
  }
  for (size_t slice = 1; slice < 8; ++slice) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint64_t previous = tables[slice - 1][byte];
      tables[slice][byte] = (previous >> 8) ^ tables[0][previous & 0xff];
    }
  }
  return tables;
}

inline constexpr Tables kTables = make_tables();

inline uint64_t update_bytewise(uint64_t state, const uint8_t* source, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) state = (state >> 8) ^ kTables[0][(state ^ source[i]) & 0xff];
  return state;
}

// Eight table lookups a word: the portable kernel, and the tail of every other one.
inline uint64_t update_sliced(uint64_t state, const uint8_t* source, size_t bytes) {
  while (bytes >= 8) {
    uint64_t word;
    std::memcpy(&word, source, 8);
    state ^= word;
    uint64_t next = 0;
    for (size_t slice = 0; slice < 8; ++slice) {
      next ^= kTables[7 - slice][(state >> (8 * slice)) & 0xff];
    }
    state = next;
    source += 8;
    bytes -= 8;
  }
  return update_bytewise(state, source, bytes);
}

}  // namespace kvx::crc64
