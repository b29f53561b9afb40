// Gathers and scatters: a table of fragments is copied by teams of threads.
#include "kernels/parameters.h"
#include "kernels/span.h"

namespace kvx::kernel {

// A team is a warp: its 32 loads of 16 bytes are neighbours. Nothing here relies on lockstep.
inline constexpr uint64_t kTeam = 32;
// Eight kilobytes are four rounds of loads in flight; the next fragment is fetched meanwhile, which
// hides the table's latency even where it lies in host memory.
inline constexpr uint64_t kStripeBytes = 8192;

KVX_DEVICE Fragment load_fragment(uint64_t address) {
  return {load<uint64_t>(address), load<uint64_t>(address + 8), load<uint64_t>(address + 16)};
}

// `fragment_bytes_max` sets how many teams share a fragment; one that is longer is still copied
// whole. Fragments must not overlap one another's targets.
KVX_KERNEL void kvx_copy_fragments(uint64_t fragments, uint64_t count,
                                   uint64_t fragment_bytes_max) {
  const uint64_t stripes =
      fragment_bytes_max > kStripeBytes ? (fragment_bytes_max - 1) / kStripeBytes + 1 : 1;
  const uint64_t threads = thread_count();
  const uint64_t team = thread_index() / kTeam;
  const uint64_t lane = thread_index() % kTeam;
  const uint64_t teams = (threads + kTeam - 1) / kTeam;
  // The last team may be short of threads; its lanes share the work among themselves.
  const uint64_t lanes = team + 1 < teams ? kTeam : threads - team * kTeam;
  const uint64_t items = count * stripes;
  uint64_t item = team;
  if (item >= items) return;
  Fragment next = load_fragment(fragments + divided(item, stripes) * sizeof(Fragment));
  while (item < items) {
    const Fragment fragment = next;
    const uint64_t stripe = item - divided(item, stripes) * stripes;
    item += teams;
    if (item < items) next = load_fragment(fragments + divided(item, stripes) * sizeof(Fragment));
    for (uint64_t at = stripe * kStripeBytes; at < fragment.bytes; at += stripes * kStripeBytes) {
      const uint64_t left = fragment.bytes - at;
      const uint64_t bytes = left < kStripeBytes ? left : kStripeBytes;
      copy_span(fragment.target + at, fragment.source + at, bytes, lane, lanes);
    }
  }
}

// Fills memory with 0xFF: not-a-number in every float format of a KV cache, so that a block that is
// used before it was written shows.
KVX_KERNEL void kvx_poison(uint64_t target, uint64_t bytes) {
  const uint64_t to_boundary = (16 - target % 16) % 16;
  const uint64_t head = to_boundary < bytes ? to_boundary : bytes;
  const uint64_t vectors = (bytes - head) / 16;
  const uint64_t tail = head + vectors * 16;
  const uint64_t step = thread_count();
  for (uint64_t i = thread_index(); i < vectors; i += step) {
    store(target + head + i * 16, Vector16{{~0u, ~0u, ~0u, ~0u}});
  }
  for (uint64_t i = thread_index(); i < head + (bytes - tail); i += step) {
    store(target + (i < head ? i : tail + (i - head)), uint8_t{0xFF});
  }
}

}  // namespace kvx::kernel
