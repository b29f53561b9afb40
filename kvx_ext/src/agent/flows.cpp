#include "agent/flows.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace kvx {

namespace {

constexpr size_t kRowsMax = 512;  // of a piece; one system call takes 1024
constexpr uint32_t kEndsMax = 512;
constexpr std::array<uint8_t, kKeyBytes> kNoKey{};

int64_t sum_of(std::span<const Descriptor> blocks) {
  int64_t total = 0;
  for (const Descriptor& block : blocks) total += block.total();
  return total;
}

// Neighbours in memory are one row.
void append_row(std::vector<iovec>* rows, const uint8_t* start, size_t bytes) {
  if (!rows->empty()) {
    iovec& last = rows->back();
    if (static_cast<const uint8_t*>(last.iov_base) + last.iov_len == start) {
      last.iov_len += bytes;
      return;
    }
  }
  rows->push_back({const_cast<uint8_t*>(start), bytes});
}

}  // namespace

void poison_rows(uint8_t* base, const Descriptor& block) {
  for (int64_t row = 0; row < block.count; ++row) {
    std::memset(base + block.offset + row * block.stride, 0xFF, static_cast<size_t>(block.bytes));
  }
}

const uint8_t* key_at(std::span<const uint8_t> keys, int64_t block) {
  return keys.empty() ? kNoKey.data() : keys.data() + static_cast<size_t>(block) * kKeyBytes;
}

Sink::Sink(uint8_t* base, std::span<const Descriptor> blocks, std::span<const uint8_t> keys)
    : base_(base), blocks_(blocks), keys_(keys), total_(sum_of(blocks)), cursor_(blocks) {}

size_t Sink::rows(std::span<iovec> target, int64_t bytes_max) const {
  RowCursor ahead = cursor_;
  size_t count = 0;
  while (count < target.size() && bytes_max > 0 && !ahead.is_at_end()) {
    const Run run = ahead.next(bytes_max);
    target[count++] = {base_ + run.offset, static_cast<size_t>(run.bytes)};
    bytes_max -= run.bytes;
  }
  return count;
}

void Sink::advance(int64_t bytes, bool is_spoilt) {
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  position_ += bytes;
  while (bytes > 0) {
    const int64_t block = cursor_.block();
    const Descriptor& descriptor = blocks_[static_cast<size_t>(block)];
    if (cursor_.done_in_block() == 0) {
      state_ = block_seed(key_at(keys_, block), static_cast<uint64_t>(descriptor.total()));
      is_spoilt_ = false;
    }
    const Run run = cursor_.next(bytes);
    bytes -= run.bytes;
    is_spoilt_ |= is_spoilt;
    if (!is_spoilt_) {
      state_ = kernel.update(state_, base_ + run.offset, static_cast<size_t>(run.bytes));
    }
    if (cursor_.block() != block) ended_.push_back({block, state_, is_spoilt_});
  }
}

void Sink::settle_next(const wire::Trailer& trailer) {
  const Ended ended = ended_[settled_++];
  if (settled_ == ended_.size()) {
    ended_.clear();
    settled_ = 0;
  }
  Code code = trailer.code;
  uint64_t expected = trailer.checksum;
  const bool is_known = expects(ended.block, &expected);
  // A peer that knows no checksum sends none: zero, which a checksum may be, too, once in 2^64.
  const bool has_checksum = is_known || trailer.checksum != 0;
  if (code == Code::kOk && ended.is_spoilt) code = Code::kStale;
  if (code == Code::kOk && (!has_checksum || ended.checksum != expected)) code = Code::kCorrupt;
  if (code != Code::kOk && !ended.is_spoilt && may_write()) {
    poison_rows(base_, blocks_[static_cast<size_t>(ended.block)]);
  }
  settle(ended.block, ended.checksum, code);
}

Source::Source(uint64_t id, bool is_to_initiator, const uint8_t* base,
               std::span<const Descriptor> blocks, std::span<const uint8_t> keys, bool computes)
    : id_(id),
      is_to_initiator_(is_to_initiator),
      base_(base),
      blocks_(blocks),
      keys_(keys),
      computes_(computes),
      cursor_(blocks),
      is_kept_(sum_of(blocks) >= kConfirmedBytes) {}

wire::Piece Source::next(int64_t bytes_max, std::vector<iovec>* rows) {
  const ChecksumKernel& kernel = fastest_checksum_kernel();
  wire::Piece piece{.position = static_cast<uint64_t>(position_)};
  ended_.clear();
  while (bytes_max > 0 && !cursor_.is_at_end() && rows->size() < kRowsMax &&
         piece.ends < kEndsMax) {
    const int64_t block = cursor_.block();
    uint64_t known = 0;
    const bool computes = computes_ && !knows(block, &known);
    if (cursor_.done_in_block() == 0 && computes) {
      const int64_t total = blocks_[static_cast<size_t>(block)].total();
      state_ = block_seed(key_at(keys_, block), static_cast<uint64_t>(total));
    }
    const Run run = cursor_.next(bytes_max);
    const uint8_t* start = base_ + run.offset;
    if (computes) state_ = kernel.update(state_, start, static_cast<size_t>(run.bytes));
    append_row(rows, start, static_cast<size_t>(run.bytes));
    bytes_max -= run.bytes;
    piece.bytes += static_cast<uint32_t>(run.bytes);
    if (cursor_.block() != block) {
      ended_.push_back(computes ? state_ : known);
      ++piece.ends;
    }
  }
  position_ += piece.bytes;
  return piece;
}

std::vector<wire::Trailer> Source::trailers() {
  const Code code = may_read();
  std::vector<wire::Trailer> made;
  made.reserve(ended_.size());
  for (const uint64_t checksum : ended_) made.push_back({checksum, code});
  ended_.clear();
  return made;
}

Status resolve(const Lease& lease, const wire::Request& request, NamedBlocks* named) {
  const LeaseTerms& terms = lease.terms;
  if (request.indices.empty()) {
    if (!lease.is_range()) return {Code::kUsage, "the lease is not of a range: name its blocks"};
    Status status = validate(request.descriptors, lease.region->bytes());
    if (!status.ok()) return status;
    const Descriptor& range = terms.blocks.front();
    for (const Descriptor& one : request.descriptors) {
      if (one.offset < range.offset || one.end() > range.end()) {
        return {Code::kUsage, "a block lies outside of the leased range"};
      }
    }
    named->blocks = request.descriptors;
    named->keys = request.keys;
    return Status::Ok();
  }
  named->blocks.reserve(request.indices.size());
  for (const uint32_t index : request.indices) {
    if (index >= terms.blocks.size()) {
      return {Code::kUsage, "block " + std::to_string(index) + " of a lease of " +
                                std::to_string(terms.blocks.size())};
    }
    named->blocks.push_back(terms.blocks[index]);
    if (!terms.checksums.empty()) named->checksums.push_back(terms.checksums[index]);
    if (request.keys.empty() && !terms.keys.empty()) {
      const auto* key = key_at(terms.keys, index);
      named->keys.insert(named->keys.end(), key, key + kKeyBytes);
    }
  }
  if (!request.keys.empty()) named->keys = request.keys;
  return Status::Ok();
}

}  // namespace kvx
