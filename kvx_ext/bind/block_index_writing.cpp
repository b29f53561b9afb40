// BlockIndex: slots and writing.
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "block_index.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

using Reserved = std::tuple<NumpyRow<uint8_t>, NumpyRow<int64_t>, NumpyRow<uint32_t>, NumpyKeys>;
using Checksums = Row<uint64_t>;

struct NewReservations {
  explicit NewReservations(size_t rows) : outcomes(rows), slots(rows), generations(rows) {}

  Reserved numpy() {
    return {outcomes.numpy(), slots.numpy(), generations.numpy(),
            adopt_keys(std::move(evicted.keys))};
  }

  NewRow<uint8_t> outcomes;
  NewRow<int64_t> slots;
  NewRow<uint32_t> generations;
  Removed evicted;
};

Reserved reserve(BlockIndex& index, const KeyRows& keys, int32_t owner, bool is_dirty,
                 uint32_t ttl_s, uint64_t now_ms) {
  NewReservations rows(keys.shape(0));
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.reserve(view_keys(keys), {owner, is_dirty, ttl_s, now_ms}, rows.outcomes.span(),
                           rows.slots.span(), rows.generations.span(), &rows.evicted);
  }
  raise_if_error(status);
  return rows.numpy();
}

Reserved insert(BlockIndex& index, const KeyRows& keys, const Checksums& checksums, int32_t owner,
                uint32_t ttl_s, uint64_t now_ms) {
  check_rows(keys.shape(0), {checksums.shape(0)});
  NewReservations rows(keys.shape(0));
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.insert(view_keys(keys), view(checksums), {owner, false, ttl_s, now_ms},
                          rows.outcomes.span(), rows.slots.span(), rows.generations.span(),
                          &rows.evicted);
  }
  raise_if_error(status);
  return rows.numpy();
}

NumpyRow<bool> commit(BlockIndex& index, const Slots& slots, const Generations& generations,
                      const Checksums& checksums) {
  const References reserved = view_references(slots, generations);
  check_rows(slots.shape(0), {checksums.shape(0)});
  NewRow<uint8_t> is_done(slots.shape(0));
  {
    nb::gil_scoped_release release;
    index.commit(reserved, view(checksums), is_done.span());
  }
  return is_done.numpy<bool>();
}

NumpyRow<bool> abort(BlockIndex& index, const Slots& slots, const Generations& generations) {
  const References reserved = view_references(slots, generations);
  NewRow<uint8_t> is_done(slots.shape(0));
  {
    nb::gil_scoped_release release;
    index.abort(reserved, is_done.span());
  }
  return is_done.numpy<bool>();
}

void add_slots(BlockIndex& index, int64_t first, int64_t count) {
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.add_slots(first, count);
  }
  raise_if_error(status);
}

bool retire_slots(BlockIndex& index, int64_t first, int64_t count) {
  bool is_retired = false;
  Removed removed;
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.retire_slots(first, count, &is_retired, &removed);
  }
  raise_if_error(status);
  return is_retired;
}

}  // namespace

void bind_index_writing(IndexClass& index) {
  index
      .def("add_slots", &add_slots, "first"_a, "count"_a,
           "Make slots first..first+count-1 free. Memory is taken for every number from 0 on. "
           "Raises UsageError when one is there already, CapacityError without memory.")
      .def(
          "retire_slots", &retire_slots, "first"_a, "count"_a,
          "Forget the blocks in a run of slots and the slots. False, and nothing done, when one of "
          "them is pinned or being written. Raises UsageError when one is not in the pool.")
      .def("reserve", &reserve, "keys"_a, "owner"_a, "is_dirty"_a, "ttl_s"_a, "now_ms"_a,
           "Find slots for new blocks, free ones first, then by eviction; `ttl_s` 0 never "
           "expires.\n\n"
           "Returns (outcomes (n,) uint8 of ReserveOutcome, slots, generations, evicted (m, 16)\n"
           "uint8 keys that had to go). Slots are those of RESERVED and EXISTS rows, else -1.\n"
           "Raises UsageError beyond 65535 owners.")
      .def("commit", &commit, "slots"_a, "generations"_a, "checksums"_a,
           "Make reserved blocks visible; (n,) bool, False where the reservation no longer stood.")
      .def("abort", &abort, "slots"_a, "generations"_a,
           "Give reserved slots back; (n,) bool, False where the reservation no longer stood.")
      .def("insert", &insert, "keys"_a, "checksums"_a, "owner"_a, "ttl_s"_a, "now_ms"_a,
           "`reserve` and `commit` in one call, returning what `reserve` does. Blocks of one batch "
           "do "
           "not evict one another.");
}

}  // namespace kvx::bind
