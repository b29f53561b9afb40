#include "kvx/copy_plan.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "copy_merge.h"
#include "copy_times.h"

namespace kvx {

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
// Sorting a list costs the CPU about as much for every run of it.
constexpr double kSortNs = 100;

// The runs of a plan as the rest of this file reads them.
struct Merged {
  Merged(const CopyRuns& runs, HostSide side)
      : targets(runs.targets.data()),
        sources(runs.sources.data()),
        bytes(runs.bytes.data()),
        hosts(side == HostSide::kNone     ? nullptr
              : side == HostSide::kTarget ? targets
                                          : sources),
        count(runs.size()) {}

  size_t sum(size_t first, size_t end) const {
    size_t total = 0;
    for (size_t i = first; i < end; ++i) total += bytes[i];
    return total;
  }

  const uint64_t* targets;
  const uint64_t* sources;
  const size_t* bytes;
  const uint64_t* hosts;  // null between devices
  size_t count;
};

// What one run of a size takes, by method. Lists have few sizes, so each is worked out once.
struct RunCost {
  size_t bytes = 0;
  double scattered_ns = kNever;  // the better of batch and single
  double rows_ns = kNever;
  double staged_ns = kNever;
  CopyMethod scattered = CopyMethod::kSingle;
  bool is_stageable = false;  // and better so than scattered
};

class Costs {
 public:
  Costs(CopyDirection direction, const CopyCalibration& calibration, const CopyLimits& limits)
      : direction_(direction),
        calibration_(calibration),
        has_batch_(limits.has_batch),
        half_staging_(limits.has_kernels && direction != CopyDirection::kDeviceToDevice
                          ? static_cast<size_t>(std::max<int64_t>(limits.staging_bytes, 0)) / 2
                          : 0) {}

  size_t half_staging() const { return half_staging_; }

  const RunCost& of(size_t bytes) {
    RunCost& known = known_[(bytes ^ bytes >> 12) % known_.size()];
    if (known.bytes != bytes) known = work_out(bytes);
    return known;
  }

 private:
  RunCost work_out(size_t bytes) const {
    const MethodTimes times = predicted_copy_times(calibration_, direction_, bytes);
    const auto of = [&times](CopyMethod method) { return times[static_cast<size_t>(method)]; };
    RunCost cost;
    cost.bytes = bytes;
    cost.scattered_ns = of(CopyMethod::kSingle);
    const double batch_ns = has_batch_ ? of(CopyMethod::kBatch) : kNever;
    if (batch_ns <= cost.scattered_ns && batch_ns != kNever) {
      cost.scattered = CopyMethod::kBatch;
      cost.scattered_ns = batch_ns;
    }
    cost.rows_ns = of(CopyMethod::kRows);
    if (bytes <= half_staging_) cost.staged_ns = of(CopyMethod::kStaged);
    cost.is_stageable = cost.staged_ns < cost.scattered_ns;
    return cost;
  }

  const CopyDirection direction_;
  const CopyCalibration& calibration_;
  const bool has_batch_;
  const size_t half_staging_;
  std::array<RunCost, 16> known_;
};

// Walks the merged runs once. The list falls into stretches: tight ones, whose runs follow each
// other on the host side and are better staged than scattered, and loose ones. Within a stretch,
// equal runs at equal strides form groups that may go as rows; a tight stretch is staged if that is
// faster than the best for its groups.
class Chooser {
 public:
  Chooser(const CopyRuns& runs, HostSide side, const CopyLimits& limits, Costs* costs,
          std::vector<CopyCall>* calls)
      : runs_(runs, side), pieces_(limits.pinned), costs_(*costs), calls_(*calls) {
    calls_.clear();
  }

  void choose() {
    for (size_t first = 0; first < runs_.count;) {
      size_t end = tight_end(first);
      if (end - first > 1) {
        place_tight(first, end);
      } else {
        end = loose_end(first);
        place_groups(first, end, 0);
      }
      first = end;
    }
  }

 private:
  bool is_tight_pair(size_t i) {
    if (i + 1 >= runs_.count) return false;
    const size_t bytes = runs_.bytes[i], next = runs_.bytes[i + 1];
    return runs_.hosts[i] + bytes == runs_.hosts[i + 1] && costs_.of(bytes).is_stageable &&
           (bytes == next || costs_.of(next).is_stageable) &&
           pieces_.of(runs_.hosts[i]).holds(runs_.hosts[i + 1]);
  }

  size_t tight_end(size_t first) {
    if (costs_.half_staging() == 0) return first + 1;
    while (is_tight_pair(first)) ++first;
    return first + 1;
  }

  size_t loose_end(size_t first) {
    if (costs_.half_staging() == 0) return runs_.count;
    do {
      ++first;
    } while (first < runs_.count && !is_tight_pair(first));
    return first;
  }

  // The end of the runs that are as large as the first.
  size_t same_end(size_t first, size_t end) const {
    size_t stop = first + 1;
    while (stop < end && runs_.bytes[stop] == runs_.bytes[first]) ++stop;
    return stop;
  }

  void place_tight(size_t first, size_t end) {
    const size_t before = calls_.size();
    const double groups_ns = place_groups(first, end, before);
    if (groups_ns > kStagedCallNs) {
      const size_t between = calls_.size();
      if (place_staged(first, end) < groups_ns) {
        const auto at = [this](size_t i) { return calls_.begin() + static_cast<ptrdiff_t>(i); };
        calls_.erase(at(before), at(between));
        return;
      }
    }
    // Once more, and now together with what stands before.
    calls_.resize(before);
    place_groups(first, end, 0);
  }

  // Cut into calls of about the same size, so that the last one is not the odd end. Returns ns.
  double place_staged(size_t first, size_t end) {
    const size_t total = runs_.sum(first, end);
    const size_t most = costs_.half_staging();
    const size_t wanted = (total + most - 1) / most;
    const size_t fair = (total + wanted - 1) / wanted;
    double ns = 0;
    CopyCall call{.method = CopyMethod::kStaged, .first = first};
    while (first < end) {
      const size_t bytes = runs_.bytes[first];
      const size_t stop = same_end(first, end);
      ns += static_cast<double>(stop - first) * costs_.of(bytes).staged_ns;
      while (first < stop) {
        // As many as it takes to be fair, unless that is more than fits.
        const size_t lacking = (fair - std::min(fair, call.bytes) + bytes - 1) / bytes;
        const size_t fitting = (most - call.bytes) / bytes;
        const size_t count = std::min({lacking, fitting, stop - first});
        call.count += count;
        call.bytes += count * bytes;
        first += count;
        if (first < stop) {
          calls_.push_back(call);
          call = {.method = CopyMethod::kStaged, .first = first};
          ns += kStagedCallNs;
        }
      }
    }
    calls_.push_back(call);
    return ns + kStagedCallNs;
  }

  // Calls before `oldest` are not added to. Returns ns.
  double place_groups(size_t first, size_t end, size_t oldest) {
    double ns = 0;
    while (first < end) {
      const RunCost& cost = costs_.of(runs_.bytes[first]);
      const bool has_rows = cost.rows_ns < cost.scattered_ns;
      size_t stop = has_rows ? group_end(first, end) : same_end(first, end);
      const double count = static_cast<double>(stop - first);
      if (has_rows && stop - first > 1 &&
          kRowsCallNs + count * cost.rows_ns < count * cost.scattered_ns) {
        place_rows(first, stop);
        ns += kRowsCallNs + count * cost.rows_ns;
      } else {
        // Its last run may be the first of a longer group.
        if (has_rows && stop - first > 1 && stop < end) --stop;
        place_scattered(cost.scattered, first, stop, oldest);
        ns += static_cast<double>(stop - first) * cost.scattered_ns;
      }
      first = stop;
    }
    return ns;
  }

  size_t group_end(size_t first, size_t end) {
    const size_t bytes = runs_.bytes[first];
    if (first + 1 == end || runs_.bytes[first + 1] != bytes) return first + 1;
    const uint64_t target_stride = runs_.targets[first + 1] - runs_.targets[first];
    const uint64_t source_stride = runs_.sources[first + 1] - runs_.sources[first];
    const uint64_t widest = static_cast<uint64_t>(kRowStrideMax);
    if (target_stride < bytes || source_stride < bytes || target_stride > widest ||
        source_stride > widest) {
      return first + 1;
    }
    const Piece piece =
        runs_.hosts == nullptr ? Piece{0, UINT64_MAX} : pieces_.of(runs_.hosts[first]);
    size_t stop = first + 1;
    while (stop < end && runs_.bytes[stop] == bytes &&
           runs_.targets[stop] - runs_.targets[stop - 1] == target_stride &&
           runs_.sources[stop] - runs_.sources[stop - 1] == source_stride &&
           (runs_.hosts == nullptr || piece.holds(runs_.hosts[stop]))) {
      ++stop;
    }
    return stop;
  }

  void place_rows(size_t first, size_t stop) {
    calls_.push_back({
        .method = CopyMethod::kRows,
        .first = first,
        .count = stop - first,
        .target_stride = static_cast<int64_t>(runs_.targets[first + 1] - runs_.targets[first]),
        .source_stride = static_cast<int64_t>(runs_.sources[first + 1] - runs_.sources[first]),
        .bytes = (stop - first) * runs_.bytes[first],
    });
  }

  // Of one size.
  void place_scattered(CopyMethod method, size_t first, size_t stop, size_t oldest) {
    const size_t bytes = (stop - first) * runs_.bytes[first];
    if (calls_.size() > oldest && calls_.back().method == method) {
      calls_.back().count += stop - first;
      calls_.back().bytes += bytes;
    } else {
      calls_.push_back({.method = method, .first = first, .count = stop - first, .bytes = bytes});
    }
  }

  const Merged runs_;
  Pieces pieces_;
  Costs& costs_;
  std::vector<CopyCall>& calls_;
};

// Makes all batched runs one call and all single ones another: a batch that stands between staged
// calls would otherwise be many small batches. Moves runs, but not within a call.
void gather_scattered(CopyPlan* plan) {
  std::vector<CopyCall>& calls = plan->calls;
  const auto rank = [](const CopyCall& call) {
    return call.method == CopyMethod::kSingle ? 2 : call.method == CopyMethod::kBatch ? 1 : 0;
  };
  if (std::ranges::count_if(calls, rank) <= 1) return;
  // By first run besides, because a stable sort would allocate.
  std::ranges::sort(calls, {},
                    [&](const CopyCall& call) { return std::pair(rank(call), call.first); });
  CopyRuns& gathered = plan->scratch.runs;
  gathered.clear();
  const auto append = [](auto* to, const auto& all, const CopyCall& call) {
    const auto begin = all.begin() + static_cast<ptrdiff_t>(call.first);
    to->insert(to->end(), begin, begin + static_cast<ptrdiff_t>(call.count));
  };
  size_t kept = 0;
  for (const CopyCall call : calls) {
    const size_t first = gathered.size();
    append(&gathered.targets, plan->runs.targets, call);
    append(&gathered.sources, plan->runs.sources, call);
    append(&gathered.bytes, plan->runs.bytes, call);
    if (kept != 0 && rank(call) != 0 && calls[kept - 1].method == call.method) {
      calls[kept - 1].count += call.count;
      calls[kept - 1].bytes += call.bytes;
    } else {
      calls[kept] = call;
      calls[kept++].first = first;
    }
  }
  calls.resize(kept);
  std::swap(plan->runs, gathered);
}

// One driver call takes only so many runs, and a batch of one is a plain copy.
void bound_batches(const CopyLimits& limits, CopyPlan* plan) {
  const size_t most = static_cast<size_t>(std::max<int64_t>(limits.batch_runs_max, 1));
  std::vector<CopyCall>& calls = plan->calls;
  const Merged runs(plan->runs, HostSide::kNone);
  for (size_t i = 0; i < calls.size(); ++i) {
    if (calls[i].method != CopyMethod::kBatch) continue;
    if (calls[i].count > most) {
      CopyCall rest = calls[i];
      rest.first += most;
      rest.count -= most;
      calls[i].count = most;
      calls[i].bytes = runs.sum(calls[i].first, rest.first);
      rest.bytes -= calls[i].bytes;
      calls.insert(calls.begin() + static_cast<ptrdiff_t>(i) + 1, rest);
    }
    if (calls[i].count == 1) calls[i].method = CopyMethod::kSingle;
  }
}

bool is_measured(const CopyCalibration& calibration, CopyDirection direction) {
  return std::ranges::any_of(
      calibration.gb_s[static_cast<size_t>(direction)], [](const auto& rates) {
        return std::ranges::any_of(rates, [](double rate) { return rate > 0; });
      });
}

// Small runs in an order in which they cannot be staged, such as plane by plane. By their mean
// size, because all that is wanted is whether a sort is worth its time.
void order_for_staging(HostSide side, const CopyLimits& limits, Costs* costs, CopyPlan* plan) {
  const Merged runs(plan->runs, side);
  if (costs->half_staging() == 0 || runs.count < 4) return;
  const RunCost& cost = costs->of(plan->total_bytes / runs.count);
  if (cost.staged_ns + kSortNs >= std::min(cost.scattered_ns, cost.rows_ns)) return;
  size_t tight = 0;
  for (size_t i = 0; i + 1 < runs.count; ++i) {
    tight += runs.hosts[i] + runs.bytes[i] == runs.hosts[i + 1];
  }
  if (4 * tight < runs.count) sort_by_host_if_contiguous(side, limits.pinned, plan);
}

}  // namespace

void plan_copies(CopyDirection direction, const CopyRuns& runs, const CopyCalibration& calibration,
                 const CopyLimits& limits, CopyPlan* plan) {
  const HostSide side = host_side(direction);
  merge_runs(runs, side, limits.pinned, plan);
  plan->total_bytes = Merged(plan->runs, side).sum(0, plan->runs.size());
  // Made only when needed: it is a table of logarithms.
  CopyCalibration published;
  const bool is_known = is_measured(calibration, direction);
  if (!is_known) published = CopyCalibration::defaults();
  Costs costs(direction, is_known ? calibration : published, limits);
  order_for_staging(side, limits, &costs, plan);
  Chooser(plan->runs, side, limits, &costs, &plan->calls).choose();
  gather_scattered(plan);
  bound_batches(limits, plan);
}

}  // namespace kvx
