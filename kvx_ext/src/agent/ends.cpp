#include "agent/ends.h"

namespace kvx {

namespace {

template <typename T>
std::span<const T> part(const std::vector<T>& values, int64_t first, int64_t count, size_t each) {
  if (values.empty()) return {};
  return std::span(values).subspan(static_cast<size_t>(first) * each,
                                   static_cast<size_t>(count) * each);
}

}  // namespace

ReadSink::ReadSink(std::shared_ptr<RemoteRecord> record, int64_t first, int64_t count)
    : Sink(record->region->base(), part(record->plan->local, first, count, 1),
           part(record->plan->keys, first, count, kKeyBytes)),
      record_(std::move(record)),
      first_(first),
      count_(count) {}

void ReadSink::settle(int64_t block, uint64_t checksum, Code code) {
  if (!record_->ledger.settle(first_ + block, code, 0, checksum)) return;
  if (code != Code::kOk) record_->has_failed.store(true, std::memory_order_relaxed);
  ++settled_;
}

bool ReadSink::expects(int64_t block, uint64_t* checksum) const {
  const std::vector<uint64_t>& known = record_->plan->checksums;
  if (known.empty()) return false;
  *checksum = known[static_cast<size_t>(first_ + block)];
  return true;
}

WriteSource::WriteSource(std::shared_ptr<RemoteRecord> record, uint64_t wire_id, int64_t first,
                         int64_t count)
    : Source(wire_id, false, record->region->base(), part(record->plan->local, first, count, 1),
             part(record->plan->keys, first, count, kKeyBytes), true),
      record_(std::move(record)),
      first_(first) {}

Code WriteSource::may_read() const {
  const bool is_over =
      record_->is_ending() || record_->is_cancelled.load(std::memory_order_relaxed);
  return is_over ? Code::kCancelled : Code::kOk;
}

bool WriteSource::knows(int64_t block, uint64_t* checksum) const {
  const std::vector<uint64_t>& known = record_->plan->checksums;
  if (known.empty()) return false;
  *checksum = known[static_cast<size_t>(first_ + block)];
  return true;
}

Serving::Serving(Granted granted, uint64_t wire_id, bool wants_checksums)
    : Granted(std::move(granted)),
      Source(wire_id, true, use->region->base(), named.blocks, named.keys, wants_checksums),
      wants_checksums_(wants_checksums) {}

Code Serving::may_read() const {
  if (is_cancelled_) return Code::kCancelled;
  if (!use) return why_released_;
  if (!use.is_live()) return Code::kStale;
  return Clock::now() < deadline ? Code::kOk : Code::kTimeout;
}

void Serving::release() {
  const Code code = may_read();
  if (use && code != Code::kOk) why_released_ = code;
  use.release();
}

int64_t Serving::bytes() const {
  int64_t total = 0;
  for (const Descriptor& block : named.blocks) total += block.total();
  return total;
}

bool Serving::knows(int64_t block, uint64_t* checksum) const {
  if (named.checksums.empty()) return false;
  *checksum = named.checksums[static_cast<size_t>(block)];
  return true;
}

Landing::Landing(Granted granted, std::vector<uint8_t> note)
    : Granted(std::move(granted)),
      Sink(use->region->base(), named.blocks, named.keys),
      note_(std::move(note)) {
  checksums_.reserve(named.blocks.size());
}

bool Landing::may_write() const {
  return !is_cancelled_ && use && use.is_live() && Clock::now() < deadline;
}

void Landing::settle(int64_t block, uint64_t checksum, Code code) {
  checksums_.push_back(code == Code::kOk ? checksum : 0);
  if (code == Code::kOk) return;
  // Bytes are thrown away for either reason; the initiator is told which.
  const bool is_late = use && use.is_live() && Clock::now() >= deadline;
  if (code == Code::kStale && is_late) code = Code::kTimeout;
  failures_.push_back({.block = static_cast<uint32_t>(block), .code = code});
}

bool Landing::expects(int64_t, uint64_t*) const { return false; }

wire::Done Landing::outcome() const {
  wire::Done done{.failures = failures_, .checksums = checksums_};
  if (is_settled()) return done;
  const Code rest = is_cancelled_              ? Code::kCancelled
                    : Clock::now() >= deadline ? Code::kTimeout
                                               : Code::kStale;
  done.code = rest;
  // Those that came are named too, since the code is of all others; in order of blocks.
  done.failures.clear();
  size_t next = 0;
  for (size_t block = 0; block < checksums_.size(); ++block) {
    const bool has_failed = next < failures_.size() && failures_[next].block == block;
    done.failures.push_back(has_failed ? failures_[next++]
                                       : wire::BlockFailure{.block = static_cast<uint32_t>(block)});
  }
  done.checksums.resize(named.blocks.size());
  return done;
}

}  // namespace kvx
