// Blocks rearranged: one layout to another, one number of ranks to another.
#include "kernels/parameters.h"
#include "kernels/span.h"

namespace kvx::kernel {

KVX_DEVICE uint64_t position(uint64_t ids, uint64_t index) {
  return ids != 0 ? load<uint64_t>(ids + index * 8) : index;
}

// Moves this thread's share of the words of a box, kUnroll loads ahead of the stores.
// `addresses(digits, &target, &source)` says where the word at a position lies; the last dimension
// of the box counts words.
template <typename Word, int kDims, typename Addresses>
KVX_DEVICE void move_words(const uint32_t* sizes, Addresses addresses) {
  const uint64_t cells = cells_of<kDims>(sizes);
  const uint64_t step = thread_count();
  uint64_t cell = thread_index();
  if (cell >= cells) return;
  Odometer<kDims> at(sizes, cell, step);
  while (cell < cells) {
    Word words[kUnroll];
    uint64_t targets[kUnroll];
    KVX_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (cell + u * step < cells) {
        uint64_t source = 0;
        addresses(at.digits, &targets[u], &source);
        words[u] = load<Word>(source);
        at.advance(sizes);
      }
    }
    KVX_UNROLL
    for (int u = 0; u < kUnroll; ++u) {
      if (cell + u * step < cells) store<Word>(targets[u], words[u]);
    }
    cell += kUnroll * step;
  }
}

template <typename Word>
KVX_DEVICE void permute_by(const PermuteParameters& p) {
  const uint32_t words = p.run_bytes / uint32_t{sizeof(Word)};
  const uint32_t sizes[kPermuteDims + 1] = {p.sizes[0], p.sizes[1], p.sizes[2],
                                            p.sizes[3], p.sizes[4], words};
  move_words<Word, kPermuteDims + 1>(
      sizes, [&p](const uint32_t* digits, uint64_t* target, uint64_t* source) {
        *target = p.target + digits[kPermuteDims] * sizeof(Word) +
                  position(p.target_ids, digits[0]) * p.target_strides[0];
        *source = p.source + digits[kPermuteDims] * sizeof(Word) +
                  position(p.source_ids, digits[0]) * p.source_strides[0];
        KVX_UNROLL
        for (int d = 1; d < kPermuteDims; ++d) {
          *target += digits[d] * p.target_strides[d];
          *source += digits[d] * p.source_strides[d];
        }
      });
}

KVX_KERNEL void kvx_permute(KVX_PARAMETER PermuteParameters p) {
  uint64_t bits = p.target | p.source | p.run_bytes;
  KVX_UNROLL
  for (int d = 0; d < kPermuteDims; ++d) {
    if (p.sizes[d] > 1 || d == 0) bits |= p.target_strides[d] | p.source_strides[d];
  }
  const uint32_t word_bytes = word_bytes_of(bits);
  if (word_bytes == 16) return permute_by<Vector16>(p);
  if (word_bytes >= 4) return permute_by<uint32_t>(p);
  if (word_bytes == 2) return permute_by<uint16_t>(p);
  permute_by<uint8_t>(p);
}

template <typename Word>
KVX_DEVICE void reshard_by(const ReshardParameters& p) {
  const uint32_t sizes[4] = {p.blocks, p.rows, p.part_count, p.run_bytes / uint32_t{sizeof(Word)}};
  move_words<Word, 4>(sizes, [&p](const uint32_t* digits, uint64_t* target, uint64_t* source) {
    const uint64_t row = digits[1];
    const uint64_t at = digits[3] * sizeof(Word);
    const uint64_t whole = p.whole + digits[0] * p.whole_block_stride +
                           (row * p.part_count + digits[2]) * p.run_bytes + at;
    const uint64_t part =
        p.parts[digits[2]] + digits[0] * p.part_block_stride + row * p.run_bytes + at;
    *target = p.is_merge != 0 ? whole : part;
    *source = p.is_merge != 0 ? part : whole;
  });
}

KVX_KERNEL void kvx_reshard(KVX_PARAMETER ReshardParameters p) {
  uint64_t bits = p.whole | p.run_bytes | p.whole_block_stride | p.part_block_stride;
  for (uint32_t part = 0; part < p.part_count; ++part) bits |= p.parts[part];
  const uint32_t word_bytes = word_bytes_of(bits);
  if (word_bytes == 16) return reshard_by<Vector16>(p);
  if (word_bytes >= 4) return reshard_by<uint32_t>(p);
  if (word_bytes == 2) return reshard_by<uint16_t>(p);
  reshard_by<uint8_t>(p);
}

}  // namespace kvx::kernel
