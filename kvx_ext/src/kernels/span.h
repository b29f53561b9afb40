// Copies in the widest words that the addresses allow, and the walk over strided dimensions.
#pragma once

#include "shim/cuda/portable.h"

namespace kvx::kernel {

// Never inlined: 64-bit division is 130 instructions, and the walk below starts with ten of them in
// every variant of every kernel (2.2 MB of fatbin became a tenth).
KVX_CALLED uint64_t divided(uint64_t number, uint64_t divisor) { return number / divisor; }

// Loads that a thread has in flight before its first store.
inline constexpr int kUnroll = 4;

// The largest of 16, 8, 4, 2 and 1 that divides everything or-ed into `bits`.
KVX_DEVICE uint32_t word_bytes_of(uint64_t bits) {
  const uint32_t low = static_cast<uint32_t>(bits | 16) & 31;
  return low & (~low + 1);
}

// Copies words `first`, `first + step`, ... of `count`; all loads of a round precede its stores.
template <typename Word>
KVX_DEVICE void copy_words(uint64_t target, uint64_t source, uint64_t count, uint64_t first,
                           uint64_t step) {
  uint64_t i = first;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    Word words[kUnroll];
    KVX_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      words[u] = load<Word>(source + (i + u * step) * sizeof(Word));
    }
    KVX_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      store<Word>(target + (i + u * step) * sizeof(Word), words[u]);
    }
  }
  KVX_ROLLED
  for (; i < count; i += step) {
    store<Word>(target + i * sizeof(Word), load<Word>(source + i * sizeof(Word)));
  }
}

KVX_DEVICE void copy_bytes(uint64_t target, uint64_t source, uint64_t bytes, uint64_t first,
                           uint64_t step) {
  KVX_ROLLED
  for (uint64_t i = first; i < bytes; i += step) {
    store(target + i, load<uint8_t>(source + i));
  }
}

// Copies whole words and, byte by byte, what does not fill one at either end.
template <typename Word>
KVX_DEVICE void copy_span_by(uint64_t target, uint64_t source, uint64_t bytes, uint64_t first,
                             uint64_t step) {
  const uint64_t to_boundary = (sizeof(Word) - target % sizeof(Word)) % sizeof(Word);
  const uint64_t head = to_boundary < bytes ? to_boundary : bytes;
  const uint64_t count = (bytes - head) / sizeof(Word);
  const uint64_t tail = head + count * sizeof(Word);
  copy_bytes(target, source, head, first, step);
  copy_words<Word>(target + head, source + head, count, first, step);
  copy_bytes(target + tail, source + tail, bytes - tail, first, step);
}

// Copies the share of thread `first` of `step` threads. The words are as wide as the two addresses
// let them be after the same head: equal modulo 16 is enough for 16 bytes.
KVX_DEVICE void copy_span(uint64_t target, uint64_t source, uint64_t bytes, uint64_t first,
                          uint64_t step) {
  const uint32_t word_bytes = word_bytes_of(target ^ source);
  if (word_bytes == 16) return copy_span_by<Vector16>(target, source, bytes, first, step);
  if (word_bytes >= 4) return copy_span_by<uint32_t>(target, source, bytes, first, step);
  copy_span_by<uint8_t>(target, source, bytes, first, step);
}

// A position in a box of `kDims` sizes, moved on by a constant number of cells: additions only,
// where dividing the cell's number anew each time would cost more than the copy. A size is less
// than 2^31, their product may be more.
template <int kDims>
struct Odometer {
  uint32_t digits[kDims];
  uint32_t steps[kDims];

  KVX_DEVICE Odometer(const uint32_t* sizes, uint64_t first, uint64_t step) {
    KVX_UNROLL
    for (int d = kDims - 1; d >= 0; --d) {
      const uint64_t cells = divided(first, sizes[d]);
      const uint64_t steps_over = divided(step, sizes[d]);
      digits[d] = static_cast<uint32_t>(first - cells * sizes[d]);
      steps[d] = static_cast<uint32_t>(step - steps_over * sizes[d]);
      first = cells;
      step = steps_over;
    }
  }

  // May carry out of the first dimension; the caller counts cells.
  KVX_DEVICE void advance(const uint32_t* sizes) {
    uint32_t carry = 0;
    KVX_UNROLL
    for (int d = kDims - 1; d >= 0; --d) {
      digits[d] += steps[d] + carry;
      carry = digits[d] >= sizes[d] ? 1 : 0;
      digits[d] -= carry != 0 ? sizes[d] : 0;
    }
  }
};

template <int kDims>
KVX_DEVICE uint64_t cells_of(const uint32_t* sizes) {
  uint64_t cells = 1;
  KVX_UNROLL
  for (int d = 0; d < kDims; ++d) cells *= sizes[d];
  return cells;
}

}  // namespace kvx::kernel
