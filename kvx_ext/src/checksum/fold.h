// Copy and CRC in one pass by carry-less multiplication, over any vector width.
//
// Four independent accumulators hide the latency of the multiplier; each folds its own quarter of
// the step, and at the end they are folded together into 16 bytes that the table code finishes.
// `V` supplies the instructions of one width; see kernel_*.cpp. Everything here has internal
// linkage on purpose: two translation units with different instruction sets must not share a copy.
#pragma once

#include "crc64.h"
#include "kvx/checksum.h"

namespace kvx::crc64 {
namespace {

inline constexpr size_t kAccumulators = 4;
inline constexpr size_t kLineBytes = 64;
// Streaming stores and loads compete for the same line buffers, so the hardware prefetcher falls
// behind; asking 1 KiB ahead took a checksum from 14.0 to 18.7 GB/s and a copy from 9.4 to 10.4
// on a Sapphire Rapids core. 512 and 4096 were slower, the non-temporal hint half as fast.
inline constexpr size_t kPrefetchBytes = 1024;
inline constexpr int kAllCaches = 3;

enum class Work : uint8_t { kChecksum, kBoth, kCopy };

template <class V>
inline void put(uint8_t* target, typename V::Vector value, bool stream) {
  if (stream) {
    V::store_streaming(target, value);
  } else {
    V::store(target, value);
  }
}

// Folds the accumulators' lanes into one 128-bit lane and lets the tables finish it.
template <class V>
uint64_t reduce(const typename V::Vector* accumulators) {
  alignas(64) uint8_t lanes[kAccumulators * V::kBytes];
  for (size_t i = 0; i < kAccumulators; ++i) V::store(lanes + i * V::kBytes, accumulators[i]);
  return update_sliced(0, lanes, sizeof(lanes));
}

// One pass over a multiple of the step. REQUIRES: bytes >= kStep; target aligned when streaming.
template <class V, Work work, bool stream>
uint64_t fold_steps(uint64_t state, uint8_t* target, const uint8_t* source, size_t bytes) {
  using Vector = typename V::Vector;
  constexpr size_t kStep = kAccumulators * V::kBytes;
  const Vector constants = V::broadcast(fold_over(static_cast<int>(kStep) * 8));
  Vector accumulators[kAccumulators];
  for (size_t i = 0; i < kAccumulators; ++i) {
    accumulators[i] = V::load(source + i * V::kBytes);
    if constexpr (work != Work::kChecksum) put<V>(target + i * V::kBytes, accumulators[i], stream);
  }
  accumulators[0] = V::exclusive_or(accumulators[0], V::low_word(state));
  for (size_t offset = kStep; offset < bytes; offset += kStep) {
    for (size_t line = 0; line < kStep; line += kLineBytes) {
      __builtin_prefetch(source + offset + line + kPrefetchBytes, 0, kAllCaches);
    }
    for (size_t i = 0; i < kAccumulators; ++i) {
      const Vector data = V::load(source + offset + i * V::kBytes);
      if constexpr (work != Work::kChecksum) put<V>(target + offset + i * V::kBytes, data, stream);
      if constexpr (work != Work::kCopy) {
        accumulators[i] = V::fold(accumulators[i], constants, data);
      }
    }
  }
  if constexpr (work == Work::kCopy) return 0;
  return reduce<V>(accumulators);
}

template <Work work>
uint64_t run_small(uint64_t state, uint8_t* target, const uint8_t* source, size_t bytes) {
  if constexpr (work != Work::kChecksum) std::memcpy(target, source, bytes);
  if constexpr (work == Work::kCopy) return 0;
  return update_sliced(state, source, bytes);
}

template <class V, Work work>
uint64_t run(uint64_t state, uint8_t* target, const uint8_t* source, size_t bytes, Stores stores) {
  constexpr size_t kStep = kAccumulators * V::kBytes;
  bool stream = work != Work::kChecksum && stores == Stores::kStreaming;
  if (stream) {
    const size_t misaligned = reinterpret_cast<uintptr_t>(target) % V::kBytes;
    const size_t head = misaligned == 0 ? 0 : V::kBytes - misaligned;
    if (bytes >= head + kStep) {
      state = run_small<work>(state, target, source, head);
      target += head;
      source += head;
      bytes -= head;
    } else {
      stream = false;
    }
  }
  const size_t folded = bytes / kStep * kStep;
  if (folded > 0) {
    state = stream ? fold_steps<V, work, true>(state, target, source, folded)
                   : fold_steps<V, work, false>(state, target, source, folded);
    if (stream) V::fence();
    if constexpr (work != Work::kChecksum) target += folded;
    source += folded;
  }
  return run_small<work>(state, target, source, bytes - folded);
}

template <class V>
uint64_t update(uint64_t state, const uint8_t* source, size_t bytes) {
  return run<V, Work::kChecksum>(state, nullptr, source, bytes, Stores::kCached);
}

template <class V>
uint64_t copy(uint64_t state, uint8_t* target, const uint8_t* source, size_t bytes, Stores stores) {
  return run<V, Work::kBoth>(state, target, source, bytes, stores);
}

template <class V>
void copy_only(uint8_t* target, const uint8_t* source, size_t bytes, Stores stores) {
  static_cast<void>(run<V, Work::kCopy>(0, target, source, bytes, stores));
}

template <class V>
constexpr ChecksumKernel make_kernel(std::string_view name) {
  return {name, update<V>, copy<V>, copy_only<V>};
}

}  // namespace
}  // namespace kvx::crc64
