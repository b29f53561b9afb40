// BlockIndex: pins, leases, expiry, removal and flushing.
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "block_index.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

using Step = void (BlockIndex::*)(References, std::span<uint8_t>);

// pin, unpin and mark_clean: a batch of references in, a flag a row out.
template <Step step>
NumpyRow<bool> over_references(BlockIndex& index, const Slots& slots,
                               const Generations& generations) {
  const References references = view_references(slots, generations);
  NewRow<uint8_t> is_done(slots.shape(0));
  {
    nb::gil_scoped_release release;
    (index.*step)(references, is_done.span());
  }
  return is_done.numpy<bool>();
}

int64_t lease(BlockIndex& index, const Slots& slots, const Generations& generations,
              uint64_t expires_ms) {
  const References references = view_references(slots, generations);
  int64_t lease_id = 0;
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.lease(references, expires_ms, &lease_id);
  }
  raise_if_error(status);
  return lease_id;
}

NumpyKeys expire(BlockIndex& index, uint64_t now_ms, int64_t slots_max) {
  Removed expired;
  {
    nb::gil_scoped_release release;
    expired = index.expire(now_ms, slots_max);
  }
  return adopt_keys(std::move(expired.keys));
}

std::tuple<NumpyKeys, NumpyRow<int64_t>> numpy(Removed removed) {
  return {adopt_keys(std::move(removed.keys)), adopt_row(std::move(removed.slots))};
}

std::tuple<NumpyKeys, NumpyRow<int64_t>> remove(BlockIndex& index, const KeyRows& keys,
                                                int reason) {
  if (reason < 1 || reason > kRemovalReasonMax) {
    raise_if_error({Code::kUsage, "a removal reason is 1 to 15, not " + std::to_string(reason)});
  }
  Removed removed;
  {
    nb::gil_scoped_release release;
    removed = index.remove(view_keys(keys), static_cast<RemovalReason>(reason));
  }
  return numpy(std::move(removed));
}

std::tuple<NumpyKeys, NumpyRow<int64_t>> clear(BlockIndex& index) {
  Removed removed;
  {
    nb::gil_scoped_release release;
    removed = index.clear();
  }
  return numpy(std::move(removed));
}

std::tuple<NumpyKeys, NumpyRow<int64_t>, NumpyRow<uint32_t>, NumpyRow<uint64_t>> take_dirty(
    BlockIndex& index, int64_t count) {
  // Callers may ask for "all of them" with a large number.
  const int64_t rows_max = std::clamp<int64_t>(count, 0, index.stats().dirty);
  const auto rows = static_cast<size_t>(rows_max);
  std::vector<BlockKey> keys(rows);
  NewRow<int64_t> slots(rows);
  NewRow<uint32_t> generations(rows);
  NewRow<uint64_t> checksums(rows);
  int64_t taken = 0;
  {
    nb::gil_scoped_release release;
    taken = index.take_dirty(keys, {slots.span(), generations.span(), checksums.span()});
  }
  const auto size = static_cast<size_t>(taken);
  keys.resize(size);
  return {adopt_keys(std::move(keys)), slots.numpy(size), generations.numpy(size),
          checksums.numpy(size)};
}

}  // namespace

void bind_index_holding(IndexClass& index) {
  index
      .def(
          "pin", &over_references<&BlockIndex::pin>, "slots"_a, "generations"_a,
          "Keep committed blocks from being evicted or reused, counted; (n,) bool, False where the "
          "reference is stale or the block has 65535 pins.")
      .def("unpin", &over_references<&BlockIndex::unpin>, "slots"_a, "generations"_a,
           "Undo one pin each; (n,) bool, False where the reference is stale or nothing pins it.")
      .def("lease", &lease, "slots"_a, "generations"_a, "expires_ms"_a,
           "Pin all blocks until `expires_ms` (0: until released) and return the lease's number. "
           "Raises StaleReference, and pins nothing, when one of them is gone.")
      .def("release", &BlockIndex::release, "lease_id"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Drop a lease's pins; False when it had expired or been released before.")
      .def("lease_is_live", &BlockIndex::lease_is_live, "lease_id"_a, "now_ms"_a,
           nb::call_guard<nb::gil_scoped_release>(), "Whether a lease still holds its blocks.")
      .def("expire", &expire, "now_ms"_a, "slots_max"_a,
           "Drop the pins of expired leases, then look at up to `slots_max` slots, from where the "
           "last call stopped, and remove expired blocks: their (m, 16) uint8 keys.")
      .def("remove", &remove, "keys"_a, "reason"_a,
           "Forget blocks for the RemovalReason given; ((m, 16) keys that were here, their slots). "
           "A pinned one is invisible at once and its slot free after the last unpin; of one being "
           "written, the commit will fail.")
      .def("clear", &clear, "Forget every block, as `remove`.")
      .def("mark_clean", &over_references<&BlockIndex::mark_clean>, "slots"_a, "generations"_a,
           "Blocks were flushed and may be evicted once unpinned; (n,) bool, False where stale.")
      .def(
          "take_dirty", &take_dirty, "count"_a,
          "Up to `count` of the coldest dirty blocks that nobody flushes, pinned: (keys, slots, "
          "generations, checksums). Owed: `mark_clean` where the write went well, `unpin` always.");
}

}  // namespace kvx::bind
