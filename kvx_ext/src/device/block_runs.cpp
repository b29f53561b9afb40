#include "kvx/block_runs.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace kvx {

namespace {

constexpr int64_t kWholeRow = std::numeric_limits<int64_t>::max();

struct Place {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t block = 0;
};

}  // namespace

Status pair_blocks(std::span<const Descriptor> targets, uint64_t target_base,
                   std::span<const Descriptor> sources, uint64_t source_base, CopyRuns* runs) {
  if (Status status = validate_fit(targets, sources); !status.ok()) return status;
  RowCursor target_rows(targets);
  RowCursor source_rows(sources);
  for (Run target = target_rows.next(kWholeRow); target.bytes > 0;) {
    const Run source = source_rows.next(target.bytes);
    runs->add(target_base + static_cast<uint64_t>(target.offset),
              source_base + static_cast<uint64_t>(source.offset),
              static_cast<size_t>(source.bytes));
    target.offset += source.bytes;
    target.bytes -= source.bytes;
    if (target.bytes == 0) target = target_rows.next(kWholeRow);
  }
  return Status::Ok();
}

int64_t find_overlap(std::span<const Descriptor> blocks) {
  std::vector<Place> places;
  RowCursor rows(blocks);
  while (!rows.is_at_end()) {
    const int64_t block = rows.block();
    const Run run = rows.next(kWholeRow);
    places.push_back({run.offset, run.offset + run.bytes, block});
  }
  std::sort(places.begin(), places.end(),
            [](const Place& one, const Place& other) { return one.begin < other.begin; });
  // The first two that overlap are neighbours.
  for (size_t i = 1; i < places.size(); ++i) {
    if (places[i].begin < places[i - 1].end) return std::max(places[i].block, places[i - 1].block);
  }
  return -1;
}

}  // namespace kvx
