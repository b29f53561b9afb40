#include "backends/uring_buffers.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

namespace kvx {

namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 30;
constexpr uint32_t kSlots = 4096;  // 4 TiB

std::string reason(int error) {
  if (error == ENOMEM) {
    return "the kernel will not pin that much (raise `ulimit -l` or grant CAP_IPC_LOCK)";
  }
  return std::strerror(error);
}

}  // namespace

Status UringBuffers::open_table() {
  if (has_table_) return Status::Ok();
  const int result = ring_.register_table(kSlots);
  if (result < 0) {
    return {Code::kUnavailable, "io_uring has no sparse buffer table: " + reason(-result), -result};
  }
  has_table_ = true;
  for (uint32_t slot = kSlots; slot > 0; --slot) free_slots_.push_back(slot - 1);
  return Status::Ok();
}

Status UringBuffers::add(uint8_t* base, int64_t bytes) {
  if (base == nullptr || bytes <= 0) return {Code::kUsage, "an empty buffer cannot be registered"};
  const auto above = pieces_.lower_bound(base + bytes);
  if (above != pieces_.begin()) {
    const auto below = std::prev(above);
    if (below->first + below->second.bytes > base) {
      return {Code::kUsage, "the buffer overlaps a registered one"};
    }
  }
  if (Status status = open_table(); !status.ok()) return status;
  for (int64_t at = 0; at < bytes; at += kPieceBytes) {
    const int64_t piece = std::min(kPieceBytes, bytes - at);
    int result = -ENOSPC;
    if (!free_slots_.empty()) result = ring_.set_buffer(free_slots_.back(), base + at, piece);
    if (result < 0) {
      remove(base);
      return {Code::kUnavailable, "cannot register a buffer with io_uring: " + reason(-result),
              -result};
    }
    pieces_[base + at] = {piece, free_slots_.back(), base};
    free_slots_.pop_back();
  }
  return Status::Ok();
}

void UringBuffers::remove(uint8_t* base) {
  for (auto piece = pieces_.find(base); piece != pieces_.end() && piece->second.owner == base;
       piece = pieces_.erase(piece)) {
    // A slot that cannot be emptied keeps its pages pinned; it must not be handed out again.
    if (ring_.set_buffer(piece->second.slot, nullptr, 0) >= 0) {
      free_slots_.push_back(piece->second.slot);
    }
  }
}

UringBuffers::Place UringBuffers::find(const uint8_t* start, int64_t bytes) const {
  const auto above = pieces_.upper_bound(start);
  if (above != pieces_.begin()) {
    const auto& [base, piece] = *std::prev(above);
    const int64_t left = base + piece.bytes - start;
    if (left > 0) return {static_cast<int>(piece.slot), std::min(bytes, left)};
  }
  if (above != pieces_.end() && above->first < start + bytes) {
    return {-1, above->first - start};
  }
  return {-1, bytes};
}

}  // namespace kvx
