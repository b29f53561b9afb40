#include "block_index.h"

#include <nanobind/stl/shared_ptr.h>

#include <string>

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

std::span<const BlockKey> view_keys(const KeyRows& keys) {
  return {reinterpret_cast<const BlockKey*>(keys.data()), keys.shape(0)};
}

NumpyKeys adopt_keys(std::vector<BlockKey> keys) {
  const size_t count = keys.size();
  auto* kept = new std::vector<BlockKey>(std::move(keys));
  nb::capsule owner(kept,
                    [](void* at) noexcept { delete static_cast<std::vector<BlockKey>*>(at); });
  return {reinterpret_cast<uint8_t*>(kept->data()), {count, sizeof(BlockKey)}, owner};
}

void check_rows(size_t count, std::initializer_list<size_t> others) {
  for (const size_t other : others) {
    if (other == count) continue;
    raise_if_error({Code::kUsage, "arrays of one batch have " + std::to_string(count) + " and " +
                                      std::to_string(other) + " rows"});
  }
}

References view_references(const Slots& slots, const Generations& generations) {
  check_rows(slots.shape(0), {generations.shape(0)});
  return {view(slots), view(generations)};
}

namespace {

std::shared_ptr<MissHistory> make_history(int64_t capacity) {
  std::shared_ptr<MissHistory> history;
  raise_if_error(MissHistory::create(capacity, &history));
  return history;
}

NumpyRow<uint8_t> why(const MissHistory& history, const KeyRows& keys) {
  NewRow<uint8_t> reasons(keys.shape(0));
  {
    nb::gil_scoped_release release;
    history.why(view_keys(keys), reasons.span());
  }
  return reasons.numpy();
}

void bind_enums(nb::module_& module) {
  nb::enum_<EvictionPolicy>(module, "EvictionPolicy", nb::is_arithmetic(),
                            "Whom to evict; see `include/kvx/eviction_policy.h`.")
      .value("LRU", EvictionPolicy::kLru, "Least recently touched.")
      .value("FIFO", EvictionPolicy::kFifo, "Oldest commit.")
      .value("LFU", EvictionPolicy::kLfu, "Least often touched, then least recently.")
      .value("LFU_WITH_RECENCY", EvictionPolicy::kLfuWithRecency,
             "Least bit width of a frequency that is halved every 8 * slots accesses.")
      .value("S3FIFO", EvictionPolicy::kS3Fifo, "Yang et al., SOSP 2023.");
  nb::enum_<ReserveOutcome>(module, "ReserveOutcome", nb::is_arithmetic(),
                            "What `BlockIndex.reserve` and `insert` did with a key.")
      .value("RESERVED", ReserveOutcome::kReserved, "The slot is the caller's.")
      .value("EXISTS", ReserveOutcome::kExists, "Committed already.")
      .value("IN_FLIGHT", ReserveOutcome::kInFlight, "Somebody else is writing it.")
      .value("NO_SPACE", ReserveOutcome::kNoSpace, "Every slot is pinned, dirty or reserved.")
      .value("QUOTA", ReserveOutcome::kQuota, "The owner is at its limit, its blocks are held.");
  nb::enum_<RemovalReason>(module, "RemovalReason", nb::is_arithmetic(),
                           "Why a block left; what `MissHistory.why` answers.")
      .value("NEVER_STORED", RemovalReason::kNeverStored, "Nothing is remembered of the key.")
      .value("EVICTED", RemovalReason::kEvicted, "To make room.")
      .value("EXPIRED", RemovalReason::kExpired, "Past its time to live.")
      .value("DROPPED", RemovalReason::kDropped, "The caller asked.")
      .value("CORRUPT", RemovalReason::kCorrupt, "Its bytes failed their checksum.")
      .value("RETIRED", RemovalReason::kRetired, "Its slot was taken out of the pool.")
      .value("CLEARED", RemovalReason::kCleared, "The whole index was emptied.")
      .value("FAILED", RemovalReason::kFailed, "The write that should have filled it failed.")
      .value("REPLACED", RemovalReason::kReplaced, "Other bytes took its place.");
}

}  // namespace

void bind_block_index(nb::module_& module) {
  bind_enums(module);
  nb::class_<MissHistory>(module, "MissHistory",
                          "Why blocks left: 4 bytes a removal, the last `capacity / 2` right in "
                          "more than 99% of cases. "
                          "Thread-safe; several indexes may write into one.")
      .def(nb::new_(&make_history), "capacity"_a,
           "Remember about `capacity` removals. Raises UsageError, CapacityError.")
      .def("why", &why, "keys"_a,
           "Why (n, 16) uint8 keys left, as (n,) uint8 of RemovalReason; 0 where nothing is known.")
      .def_prop_ro("capacity", &MissHistory::capacity, "Removals it has room for.")
      .def_prop_ro("memory_bytes", &MissHistory::memory_bytes, "What it takes.");

  IndexClass index(
      module, "BlockIndex",
      "Which block is in which slot of one pool: slot table, hash map and eviction order in "
      "one.\n\n"
      "A slot is free, reserved (being written), committed (visible), or doomed (removed while\n"
      "pinned). References {slot, generation, key} name one life of a slot; stale ones are "
      "ignored\n"
      "and said so, row by row. Earlier keys of a batch end up more recent than later ones.\n"
      "Keys are (n, 16) uint8, slots int64 (-1: none), generations uint32, checksums uint64,\n"
      "times milliseconds of any one clock. Thread-safe: one lock a batch, without the GIL.\n"
      "The full manual is `kvx_ext/include/kvx/block_index.h`.");
  index.def(nb::init<EvictionPolicy, std::shared_ptr<MissHistory>>(), "policy"_a,
            nb::arg("history").none() = nb::none(),
            "An index without slots; why blocks leave is written to `history` if there is one.");
  bind_index_writing(index);
  bind_index_reading(index);
  bind_index_holding(index);
  bind_index_admin(index);
}

}  // namespace kvx::bind
