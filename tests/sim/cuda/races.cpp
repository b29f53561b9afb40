#include "races.h"

#include <algorithm>
#include <bit>

namespace kvx::sim {

namespace {

constexpr size_t kForgetFrom = 256;

unsigned class_of(uint64_t bytes) { return static_cast<unsigned>(std::bit_width(bytes)); }

const char* verb(const Access& access) { return access.is_write ? " writes " : " reads "; }

std::string text_of(const Access& access) {
  return access.label.text() + verb(access) + range_text(access.start, access.end - access.start);
}

bool covers(const Access& outer, const Access& inner) {
  return outer.start <= inner.start && outer.end >= inner.end;
}

// Whether `now`, which is ordered after `before`, says all that `before` does: whatever is not
// ordered after `now` conflicts with it as well.
bool supersedes(const Access& now, const Access& before) {
  if (!covers(now, before)) return false;
  return now.is_write || !before.is_write;
}

bool is_same_operation(const Access& a, const Access& b) {
  return a.owner == b.owner && a.epoch == b.epoch;
}

}  // namespace

void RaceDetector::reset() {
  host = VectorClock();
  classes_.clear();
  words.clear();
  convicted_.clear();
  count_ = 0;
  limit_ = kForgetFrom;
  next_owner_ = kHostOwner + 1;
}

// `visit` returns whether to drop the access.
template <typename Visit>
void RaceDetector::visit_overlapping(uint64_t start, uint64_t end, Visit visit) {
  for (auto& [bits, accesses] : classes_) {
    const uint64_t longest = uint64_t{1} << bits;
    auto at = accesses.lower_bound(start > longest ? start - longest : 0);
    while (at != accesses.end() && at->first < end) {
      if (at->second.end > start && visit(at->second)) {
        at = accesses.erase(at);
        --count_;
      } else {
        ++at;
      }
    }
  }
}

void RaceDetector::convict(const Access& before, const Access& now, Convictions& convictions) {
  const uint64_t pair = (before.label.number << 32U) ^ now.label.number;
  // The host's accesses have no numbers: every one of them counts.
  const bool has_numbers = before.label.number != 0 && now.label.number != 0;
  if (has_numbers && !convicted_.insert(pair).second) return;
  convictions.add("race", text_of(before) + " and " + text_of(now) + " are not ordered");
}

void RaceDetector::add(const Access& access, const VectorClock& known, Convictions& convictions) {
  if (access.start >= access.end) return;
  visit_overlapping(access.start, access.end, [&](const Access& before) {
    const bool is_one = is_same_operation(before, access);
    const bool is_ordered = is_one ? access.is_kernel : known.at(before.owner) >= before.epoch;
    if (!is_ordered && (before.is_write || access.is_write)) {
      convict(before, access, convictions);
    }
    return is_ordered && !is_one && supersedes(access, before);
  });
  classes_[class_of(access.end - access.start)].emplace(access.start, access);
  ++count_;
}

void RaceDetector::add_host(uint64_t address, size_t bytes, bool is_write, const char* symbol,
                            Convictions& convictions) {
  const auto word = words.find(address);
  if (word != words.end() && bytes <= sizeof(uint64_t)) {
    if (is_write) {
      word->second.is_announced = true;
      word->second.clock.join(host);
    } else {
      // Reading a word that a stream wrote is how the host learns what came before.
      host.join(word->second.clock);
    }
    return;
  }
  host.set(kHostOwner, host.at(kHostOwner) + 1);
  const Label label{symbol, 0, 0};
  add({address, address + bytes, is_write, kHostOwner, host.at(kHostOwner), label, false}, host,
      convictions);
}

VectorClock RaceDetector::seen(uint64_t word) const {
  const auto found = words.find(word);
  VectorClock clock = found == words.end() ? VectorClock() : found->second.clock;
  if (found == words.end() || !found->second.is_announced) clock.join(host);
  return clock;
}

void RaceDetector::remove(uint64_t address, size_t bytes, const char* symbol,
                          Convictions& convictions) {
  visit_overlapping(address, address + bytes, [&](const Access& before) {
    if (host.at(before.owner) < before.epoch) {
      convictions.add("free_in_flight", std::string(symbol) + " of " + range_text(address, bytes) +
                                            " while " + text_of(before) +
                                            ", which the host does not know to have ended");
    }
    return true;
  });
  words.erase(words.lower_bound(address), words.lower_bound(address + bytes));
}

void RaceDetector::forget(const std::vector<VectorClock>& others) {
  for (auto& [bits, accesses] : classes_) {
    count_ -= std::erase_if(accesses, [&](const auto& entry) {
      const Access& access = entry.second;
      const auto knows = [&](const VectorClock& clock) {
        return clock.at(access.owner) >= access.epoch;
      };
      return knows(host) && std::all_of(others.begin(), others.end(), knows);
    });
  }
  limit_ = 2 * count_ + kForgetFrom;
}

}  // namespace kvx::sim
