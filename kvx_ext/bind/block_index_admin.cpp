// BlockIndex: owners, recovery, statistics.
#include "block_index.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

NumpyKeys set_owner_limit(BlockIndex& index, int32_t owner, int64_t slots_max) {
  Removed evicted;
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.set_owner_limit(owner, slots_max, &evicted);
  }
  raise_if_error(status);
  return adopt_keys(std::move(evicted.keys));
}

NumpyRow<bool> restore(BlockIndex& index, const KeyRows& keys, const Slots& slots,
                       const Generations& generations, const Row<uint64_t>& checksums,
                       const Row<uint8_t>& freqs, const Row<int64_t>& expiry_s,
                       const Row<int32_t>& owners) {
  const References places = view_references(slots, generations);
  check_rows(slots.shape(0), {keys.shape(0), checksums.shape(0), freqs.shape(0), expiry_s.shape(0),
                              owners.shape(0)});
  NewRow<uint8_t> is_done(slots.shape(0));
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.restore(
        {view_keys(keys), places, view(checksums), view(freqs), view(expiry_s), view(owners)},
        is_done.span());
  }
  raise_if_error(status);
  return is_done.numpy<bool>();
}

nb::dict snapshot(BlockIndex& index) {
  IndexSnapshot taken;
  {
    nb::gil_scoped_release release;
    taken = index.snapshot();
  }
  const size_t count = taken.keys.size();
  nb::dict out;
  out["keys"] = adopt_keys(std::move(taken.keys));
  out["slots"] = adopt_row(std::move(taken.slots));
  out["generations"] = adopt_row(std::move(taken.generations));
  out["checksums"] = adopt_row(std::move(taken.checksums));
  out["freqs"] = adopt_row(std::move(taken.frequencies));
  out["ticks"] = adopt_row(std::move(taken.ticks));
  out["expiry_s"] = adopt_row(std::move(taken.expiry_s));
  out["owners"] = adopt_row(std::move(taken.owners));
  out["pins"] = adopt_row(std::move(taken.pins));
  out["dirty"] = adopt<bool, 1>(std::move(taken.is_dirty), {count});
  return out;
}

nb::dict stats(BlockIndex& index) {
  IndexStats now;
  {
    nb::gil_scoped_release release;
    now = index.stats();
  }
  nb::dict out;
  out["slots_total"] = now.slots_total;
  out["slots_free"] = now.slots_free;
  out["used"] = now.slots_total - now.slots_free;
  out["committed"] = now.committed;
  out["reserved"] = now.reserved;
  out["doomed"] = now.doomed;
  out["pinned"] = now.pinned;
  out["dirty"] = now.dirty;
  out["expiring"] = now.expiring;
  out["leases"] = now.leases;
  out["owners"] = now.owners;
  out["inserted"] = now.inserted;
  out["hits"] = now.hits;
  out["misses"] = now.misses;
  out["evicted"] = now.evicted;
  out["expired"] = now.expired;
  out["removed"] = now.removed;
  out["aborted"] = now.aborted;
  out["leases_expired"] = now.leases_expired;
  out["memory_bytes"] = now.memory_bytes;
  out["history_memory_bytes"] = now.history_memory_bytes;
  return out;
}

void check_integrity(BlockIndex& index) {
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.check_integrity();
  }
  raise_if_error(status);
}

// One number of the statistics, read without the GIL because the lock may be held elsewhere.
template <int64_t IndexStats::* field>
int64_t one(BlockIndex& index) {
  nb::gil_scoped_release release;
  return index.stats().*field;
}

}  // namespace

void bind_index_admin(IndexClass& index) {
  index
      .def(
          "set_owner_limit", &set_owner_limit, "owner"_a, "slots_max"_a,
          "Let an owner hold at most `slots_max` slots (-1: no limit); evicts down to it as far as "
          "blocks may go and returns their (m, 16) uint8 keys. Raises UsageError.")
      .def("owner_used", &BlockIndex::owner_used, "owner"_a,
           nb::call_guard<nb::gil_scoped_release>(),
           "Slots an owner holds: reserved, committed and doomed.")
      .def(
          "restore", &restore, "keys"_a, "slots"_a, "generations"_a, "checksums"_a, "freqs"_a,
          "expiry_s"_a, "owners"_a,
          "Commit blocks whose bytes are in their slots already, coldest first; `freqs` uint8, "
          "`expiry_s` int64 seconds (0: never), `owners` int32. (n,) bool, False where the slot is "
          "not free, the key is here already or the owner at its limit.")
      .def("snapshot", &snapshot, nb::sig("def snapshot(self) -> dict[str, numpy.ndarray]"),
           "All committed blocks, coldest first: keys, slots, generations, checksums, freqs, ticks "
           "(of the last move to a hot end), expiry_s, owners, pins, dirty.")
      .def("stats", &stats, nb::sig("def stats(self) -> dict[str, int]"),
           "Numbers of slots by state, counters since the start, and memory_bytes (all but the "
           "history).")
      .def(
          "check_integrity", &check_integrity,
          "Raise CorruptBlock naming the first violated invariant. O(slots); for tests and doctor.")
      .def_prop_ro("num_free", &one<&IndexStats::slots_free>, "Slots that are free now.")
      .def_prop_ro("num_slots", &one<&IndexStats::slots_total>, "Slots of the pool.");
}

}  // namespace kvx::bind
