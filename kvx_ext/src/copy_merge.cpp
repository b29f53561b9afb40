#include "copy_merge.h"

#include <algorithm>
#include <bit>

namespace kvx {

namespace {

using Run = CopyPlan::Scratch::Run;

void resize(CopyRuns* runs, size_t size) {
  runs->targets.resize(size);
  runs->sources.resize(size);
  runs->bytes.resize(size);
}

// Writes merged runs into vectors that are grown ahead and cut to size in the end: three
// push_back() a run would cost as much as everything else.
class Writer {
 public:
  Writer(CopyRuns* merged, size_t expected, Pieces* pieces, HostSide side)
      : merged_(merged), pieces_(pieces), side_(side) {
    grow(expected);
  }
  ~Writer() { resize(merged_, count_); }
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  // `last_*_` and `room_` say where the last run ends and how far it may grow in its piece.
  void add(uint64_t target, uint64_t source, size_t bytes) {
    if (target == target_end_ && source == source_end_ && room_ != 0) {
      const size_t part = std::min(bytes, room_);
      bytes_[count_ - 1] += part;
      advance(target + part, source + part, room_ - part);
      if (part == bytes) return;
      target += part;
      source += part;
      bytes -= part;
    }
    do {
      const size_t limit = reach(target, source);
      const size_t part = std::min(bytes, limit);
      if (count_ == capacity_) grow(2 * capacity_);
      targets_[count_] = target;
      sources_[count_] = source;
      bytes_[count_] = part;
      ++count_;
      target += part;
      source += part;
      bytes -= part;
      advance(target, source, limit - part);
    } while (bytes != 0);
  }

 private:
  size_t reach(uint64_t target, uint64_t source) {
    if (side_ == HostSide::kNone) return SIZE_MAX;
    const uint64_t host = side_ == HostSide::kTarget ? target : source;
    return pieces_->of(host).end - host;
  }

  void advance(uint64_t target_end, uint64_t source_end, size_t room) {
    target_end_ = target_end;
    source_end_ = source_end;
    room_ = room;
  }

  void grow(size_t capacity) {
    capacity_ = std::max<size_t>(capacity, 16);
    resize(merged_, capacity_);
    targets_ = merged_->targets.data();
    sources_ = merged_->sources.data();
    bytes_ = merged_->bytes.data();
  }

  CopyRuns* merged_;
  Pieces* pieces_;
  const HostSide side_;
  uint64_t* targets_ = nullptr;
  uint64_t* sources_ = nullptr;
  size_t* bytes_ = nullptr;
  size_t count_ = 0;
  size_t capacity_ = 0;
  uint64_t target_end_ = 0;
  uint64_t source_end_ = 0;
  size_t room_ = 0;
};

void merge_in_order(const CopyRuns& runs, HostSide side,
                    std::span<const CopyLimits::PinnedSpan> pinned, CopyRuns* merged) {
  Pieces pieces(pinned);
  Writer writer(merged, runs.size(), &pieces, side);
  const uint64_t* targets = runs.targets.data();
  const uint64_t* sources = runs.sources.data();
  const size_t* bytes = runs.bytes.data();
  for (size_t i = 0; i < runs.size(); ++i) writer.add(targets[i], sources[i], bytes[i]);
}

// How many runs begin where another one ends: by a bit for every end, so in linear time, and a
// little too many where bits collide (one in sixteen at most).
size_t count_touching(const uint64_t* ones, const uint64_t* others, const size_t* bytes,
                      size_t count, std::vector<uint64_t>* bits) {
  const size_t size = std::bit_ceil(std::max<size_t>(16 * count, 1024));
  const int shift = 64 - std::countr_zero(size);
  const auto place = [shift](uint64_t one, uint64_t other) {
    return (one * 0x9E3779B97F4A7C15U ^ other * 0xC2B2AE3D27D4EB4FU) >> shift;
  };
  bits->assign(size / 64, 0);
  uint64_t* words = bits->data();
  for (size_t i = 0; i < count; ++i) {
    const uint64_t at = place(ones[i] + bytes[i], others[i] + bytes[i]);
    words[at / 64] |= uint64_t{1} << (at % 64);
  }
  size_t touching = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t at = place(ones[i], others[i]);
    touching += words[at / 64] >> (at % 64) & 1;
  }
  return touching;
}

void sort_and_merge(uint64_t Run::* key, HostSide side,
                    std::span<const CopyLimits::PinnedSpan> pinned, CopyPlan* plan) {
  std::vector<Run>& sorted = plan->scratch.sorted;
  const size_t count = plan->runs.size();
  sorted.resize(count);
  for (size_t i = 0; i < count; ++i) {
    sorted[i] = {plan->runs.targets[i], plan->runs.sources[i], plan->runs.bytes[i]};
  }
  std::ranges::sort(sorted, {}, key);
  Pieces pieces(pinned);
  Writer writer(&plan->runs, count, &pieces, side);
  for (const Run& run : sorted) writer.add(run.target, run.source, run.bytes);
}

}  // namespace

Piece Pieces::find(uint64_t address) const {
  const auto next = std::ranges::upper_bound(spans_, address, {}, &CopyLimits::PinnedSpan::base);
  const uint64_t end = next == spans_.end() ? UINT64_MAX : next->base;
  if (next == spans_.begin()) return {0, end};
  const CopyLimits::PinnedSpan& span = *(next - 1);
  const uint64_t offset = address - span.base;
  if (offset >= span.bytes) return {span.base + span.bytes, end};
  const uint64_t piece_bytes = span.piece_bytes == 0 ? span.bytes : span.piece_bytes;
  // A division takes as long as the rest of the look-up; pieces are powers of two nearly always.
  const uint64_t within =
      std::has_single_bit(piece_bytes) ? offset & (piece_bytes - 1) : offset % piece_bytes;
  const uint64_t begin = offset - within;
  return {span.base + begin, span.base + std::min(begin + piece_bytes, span.bytes)};
}

void merge_runs(const CopyRuns& runs, HostSide side, std::span<const CopyLimits::PinnedSpan> pinned,
                CopyPlan* plan) {
  merge_in_order(runs, side, pinned, &plan->runs);
  const CopyRuns& merged = plan->runs;
  const size_t count = merged.size();
  if (count < 4 || std::ranges::is_sorted(merged.targets)) return;
  const size_t touching = count_touching(merged.targets.data(), merged.sources.data(),
                                         merged.bytes.data(), count, &plan->scratch.bits);
  if (4 * touching >= count) sort_and_merge(&Run::target, side, pinned, plan);
}

bool sort_by_host_if_contiguous(HostSide side, std::span<const CopyLimits::PinnedSpan> pinned,
                                CopyPlan* plan) {
  const CopyRuns& runs = plan->runs;
  const std::vector<uint64_t>& hosts = side == HostSide::kTarget ? runs.targets : runs.sources;
  const size_t touching = count_touching(hosts.data(), hosts.data(), runs.bytes.data(), runs.size(),
                                         &plan->scratch.bits);
  if (2 * touching < runs.size()) return false;
  sort_and_merge(side == HostSide::kTarget ? &Run::target : &Run::source, side, pinned, plan);
  return true;
}

}  // namespace kvx
