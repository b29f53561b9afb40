// What the kernels are told, as host and device both see it. Addresses are the device's; host
// memory that is registered is addressed there too. Strides and sizes are in bytes unless the name
// says otherwise. A size is less than 2^31.
#pragma once

#include "shim/cuda/portable.h"

namespace kvx::kernel {

// One run of bytes to be copied; tables of these may lie in device or in pinned host memory.
struct Fragment {
  uint64_t target = 0;
  uint64_t source = 0;
  uint64_t bytes = 0;
};

inline constexpr int kPermuteDims = 5;

// A copy between two arrays of equal shape and different strides, in runs that are contiguous in
// both. The last dimension varies fastest over the threads; unused ones have size 1. A table of
// positions replaces 0, 1, 2... of the first dimension: the numbers of an engine's blocks.
struct PermuteParameters {
  uint64_t target = 0;
  uint64_t source = 0;
  uint64_t target_ids = 0;  // address of int64[sizes[0]], or 0
  uint64_t source_ids = 0;  // the same
  int64_t target_strides[kPermuteDims] = {};
  int64_t source_strides[kPermuteDims] = {};
  uint32_t sizes[kPermuteDims] = {1, 1, 1, 1, 1};
  uint32_t run_bytes = 0;
};

inline constexpr int kReshardParts = 16;

// Blocks of (rows, part_count, run) <-> part_count arrays of blocks of (rows, run): where the KV
// heads of one rank become those of several, or the other way round.
struct ReshardParameters {
  uint64_t whole = 0;
  uint64_t parts[kReshardParts] = {};
  int64_t whole_block_stride = 0;
  int64_t part_block_stride = 0;
  uint32_t blocks = 0;
  uint32_t rows = 0;
  uint32_t part_count = 0;
  uint32_t run_bytes = 0;
  uint32_t is_merge = 0;  // parts -> whole; else whole -> parts
  uint32_t reserved = 0;
};

enum FloatKind : uint32_t { kFloat16 = 0, kBfloat16 = 1, kFloat32 = 2 };

// Blocks of (tokens, heads, dim) elements whose `dim` is contiguous, wide and as FP8. Each block
// and head has one float32 in `scales`, (blocks, heads) contiguous. Where keys and values of a
// block are to have scales of their own, each is a block here.
struct QuantiseParameters {
  uint64_t wide = 0;      // kFloat16, kBfloat16 or kFloat32
  uint64_t narrow = 0;    // e4m3fn
  uint64_t scales = 0;    // written by kvx_scale, read by the rest
  uint64_t partials = 0;  // float32[blocks * heads * kAmaxSlices], scratch of kvx_amax, kvx_scale
  int64_t wide_strides[3] = {};    // of block, token, head
  int64_t narrow_strides[3] = {};  // the same
  uint32_t blocks = 0;
  uint32_t tokens = 0;
  uint32_t heads = 0;
  uint32_t dim = 0;
  uint32_t wide_kind = kFloat16;
  uint32_t reserved = 0;
};

// Threads that look for the largest value of one block and head, each in its share.
inline constexpr uint32_t kAmaxSlices = 32;

}  // namespace kvx::kernel
