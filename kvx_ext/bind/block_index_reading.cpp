// BlockIndex: reading.
#include <nanobind/stl/tuple.h>

#include <numeric>
#include <string>
#include <tuple>

#include "block_index.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

struct NewPlaces {
  explicit NewPlaces(size_t rows) : slots(rows), generations(rows), checksums(rows) {}
  Places view() { return {slots.span(), generations.span(), checksums.span()}; }

  NewRow<int64_t> slots;
  NewRow<uint32_t> generations;
  NewRow<uint64_t> checksums;
};

std::tuple<int64_t, NumpyRow<int64_t>, NumpyRow<uint32_t>, NumpyRow<uint64_t>> match(
    BlockIndex& index, const KeyRows& keys, uint64_t now_ms, bool touch, bool pin) {
  NewPlaces rows(keys.shape(0));
  int64_t count = 0;
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.match(view_keys(keys), {now_ms, touch, pin}, rows.view(), &count);
  }
  raise_if_error(status);
  const auto found = static_cast<size_t>(count);
  return {count, rows.slots.numpy(found), rows.generations.numpy(found),
          rows.checksums.numpy(found)};
}

std::tuple<NumpyRow<bool>, NumpyRow<int64_t>, NumpyRow<uint32_t>, NumpyRow<uint64_t>> lookup(
    BlockIndex& index, const KeyRows& keys, uint64_t now_ms, bool touch, bool pin) {
  NewPlaces rows(keys.shape(0));
  NewRow<uint8_t> is_found(keys.shape(0));
  Status status;
  {
    nb::gil_scoped_release release;
    status = index.lookup(view_keys(keys), {now_ms, touch, pin}, is_found.span(), rows.view());
  }
  raise_if_error(status);
  return {is_found.numpy<bool>(), rows.slots.numpy(), rows.generations.numpy(),
          rows.checksums.numpy()};
}

void check_lengths(std::span<const int64_t> lengths, size_t num_keys) {
  size_t left = num_keys;
  for (const int64_t length : lengths) {
    if (length < 0 || static_cast<uint64_t>(length) > left) {
      raise_if_error({Code::kUsage,
                      "prefix lengths do not add up to the " + std::to_string(num_keys) + " keys"});
    }
    left -= static_cast<size_t>(length);
  }
  if (left != 0) raise_if_error({Code::kUsage, std::to_string(left) + " keys are in no prefix"});
}

NumpyRow<int64_t> match_many(BlockIndex& index, const KeyRows& keys, const Row<int64_t>& lengths,
                             uint64_t now_ms) {
  check_lengths(view(lengths), keys.shape(0));
  NewRow<int64_t> counts(lengths.shape(0));
  {
    nb::gil_scoped_release release;
    index.match_many(view_keys(keys), view(lengths), now_ms, counts.span());
  }
  return counts.numpy();
}

NumpyRow<bool> validate(BlockIndex& index, const KeyRows& keys, const Slots& slots,
                        const Generations& generations) {
  const References references = view_references(slots, generations);
  check_rows(slots.shape(0), {keys.shape(0)});
  NewRow<uint8_t> is_live(slots.shape(0));
  {
    nb::gil_scoped_release release;
    index.validate(view_keys(keys), references, is_live.span());
  }
  return is_live.numpy<bool>();
}

NumpyRow<uint8_t> inspect(BlockIndex& index, const KeyRows& keys, uint64_t now_ms) {
  NewRow<uint8_t> conditions(keys.shape(0));
  {
    nb::gil_scoped_release release;
    index.inspect(view_keys(keys), now_ms, conditions.span());
  }
  return conditions.numpy<uint8_t>();
}

}  // namespace

void bind_index_reading(IndexClass& index) {
  index
      .def(
          "match", &match, "keys"_a, "now_ms"_a, "touch"_a, "pin"_a,
          "Find the longest prefix that is here: (count, slots, generations, checksums), arrays of "
          "`count` rows. `touch` counts as a use; what is found with `pin` must be unpinned. "
          "Raises UsageError, and pins nothing, beyond 65535 pins of one block.")
      .def("lookup", &lookup, "keys"_a, "now_ms"_a, "touch"_a, "pin"_a,
           "Find every key: (is_found (n,) bool, slots, generations, checksums); -1, 0, 0 in rows "
           "that are not here. Otherwise as `match`.")
      .def("match_many", &match_many, "keys"_a, "prefix_lengths"_a, "now_ms"_a,
           "Length found of each of several prefixes laid end to end, (m,) int64, without touch, "
           "pin "
           "or hit counters. Raises UsageError when the lengths do not add up to the keys.")
      .def("inspect", &inspect, "keys"_a, "now_ms"_a,
           "What the index knows of every key, (n,) uint8: 0 absent, 1 held, 2 expired, 3 being "
           "written. For explaining misses: counts as no use.")
      .def("validate", &validate, "keys"_a, "slots"_a, "generations"_a,
           "Whether references still name the same block, (n,) bool: ask before and after copying "
           "bytes without a pin. True for a removed block until its last pin goes.");
}

}  // namespace kvx::bind
