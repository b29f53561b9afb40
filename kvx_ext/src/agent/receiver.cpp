#include "agent/receiver.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

namespace kvx {

namespace {

constexpr size_t kBufferBytes = 64 << 10;
constexpr size_t kScrapBytes = 256 << 10;
// Checksummed right after it was received, while it is in the cache.
constexpr int64_t kStepBytes = 256 << 10;
constexpr size_t kRowsMax = 64;
constexpr size_t kFdsMax = 64;  // of regions that were not announced yet

}  // namespace

Receiver::Receiver() : buffer_(kBufferBytes) {}

int64_t Receiver::fail(const std::string& why) {
  failure_ = why;
  return -1;
}

int64_t Receiver::receive(Stream& stream, FrameHandler& handler, int64_t budget) {
  int64_t total = 0;
  while (total < budget) {
    while (step(handler)) {
    }
    if (!failure_.empty()) return -1;
    if (handler.is_paused()) return total;
    const bool is_direct = state_ == State::kPayload;
    const int64_t received = is_direct ? receive_payload(stream) : fill(stream);
    if (received == -EAGAIN) break;
    if (received <= 0) return ended_by(received, stream);
    total += received;
    if (is_direct && payload_left_ == 0) state_ = State::kTrailers;
  }
  while (step(handler)) {
  }
  return failure_.empty() ? total : -1;
}

int64_t Receiver::ended_by(int64_t received, Stream& stream) {
  const std::string why = stream.failure();
  if (!why.empty()) return fail(why);
  if (received == 0) return fail("the peer closed the connection");
  return fail(std::string("the connection failed: ") + std::strerror(static_cast<int>(-received)));
}

int64_t Receiver::fill(Stream& stream) {
  if (begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  const iovec room{buffer_.data() + end_, buffer_.size() - end_};
  const int64_t received = stream.receive({&room, 1}, &fds_);
  if (received > 0) end_ += static_cast<size_t>(received);
  if (fds_.size() > kFdsMax) return -EPROTO;
  return received;
}

// One system call for the rows of the piece and whatever follows it.
int64_t Receiver::receive_payload(Stream& stream) {
  std::array<iovec, kRowsMax + 1> rows;
  const int64_t step = std::min(payload_left_, kStepBytes);
  const bool writes = sink_ != nullptr && sink_->may_write();
  size_t count = 0;
  if (writes) {
    count = sink_->rows(std::span(rows).first(kRowsMax), step);
  } else {
    scrap_.resize(kScrapBytes);
    rows[count++] = {scrap_.data(), static_cast<size_t>(std::min<int64_t>(step, kScrapBytes))};
  }
  int64_t room = 0;
  for (size_t i = 0; i < count; ++i) room += static_cast<int64_t>(rows[i].iov_len);
  const bool is_last = room == payload_left_;
  if (is_last) {
    begin_ = end_ = 0;
    rows[count++] = {buffer_.data(), buffer_.size()};
  }
  const int64_t received = stream.receive(std::span(rows).first(count), &fds_);
  if (received <= 0) return received;
  const int64_t payload = std::min(received, room);
  payload_left_ -= payload;
  end_ += static_cast<size_t>(received - payload);
  if (sink_ != nullptr) sink_->advance(payload, !writes);
  return received;
}

// Handles what is buffered; false when more bytes are needed first.
bool Receiver::step(FrameHandler& handler) {
  if (!failure_.empty() || handler.is_paused()) return false;
  switch (state_) {
    case State::kHeader:
      return on_header(handler);
    case State::kBody:
      return on_body(handler);
    case State::kPieceHeader:
      return on_piece_header(handler);
    case State::kPayload:
      if (!has_buffered()) return false;
      on_payload();
      return true;
    case State::kTrailers:
      return on_trailers(handler);
  }
  return false;
}

bool Receiver::on_header(FrameHandler& handler) {
  if (buffered().size() < wire::kHeaderBytes) return false;
  const bool is_known = wire::decode(buffered().first<wire::kHeaderBytes>(), &header_);
  if (is_known && handler.defers(header_)) return false;
  const bool is_frame = is_known && handler.accepts(header_);
  if (!is_frame) {
    fail("it sent what is no frame of the protocol, or none that may come now");
    return false;
  }
  begin_ += wire::kHeaderBytes;
  body_.clear();
  state_ = header_.type == wire::Type::kPiece ? State::kPieceHeader : State::kBody;
  return true;
}

bool Receiver::on_body(FrameHandler& handler) {
  // Grows with what has come, not with what was announced.
  const size_t missing = header_.bytes - body_.size();
  const auto some = buffered().first(std::min(missing, buffered().size()));
  const bool is_whole = body_.empty() && some.size() == missing;
  if (!is_whole) body_.insert(body_.end(), some.begin(), some.end());
  if (some.size() < missing) {
    begin_ += some.size();
    return false;
  }
  state_ = State::kHeader;
  const bool is_fine = handler.on_frame(header_, is_whole ? some : std::span(body_), fds_);
  begin_ += some.size();
  if (!is_fine)
    fail("it broke the protocol with a frame of type " +
         std::to_string(static_cast<int>(header_.type)));
  return is_fine;
}

bool Receiver::on_piece_header(FrameHandler& handler) {
  if (buffered().size() < wire::kPieceBytes) return false;
  bool is_wrong = !wire::decode(buffered().first<wire::kPieceBytes>(), header_, &piece_);
  begin_ += wire::kPieceBytes;
  sink_ = is_wrong ? nullptr : handler.sink_of(header_, piece_, &is_wrong);
  if (sink_ != nullptr) {
    is_wrong |= static_cast<int64_t>(piece_.position) != sink_->position() ||
                static_cast<int64_t>(piece_.bytes) > sink_->total() - sink_->position();
  }
  if (is_wrong) {
    sink_ = nullptr;
    fail("it sent a piece that does not fit its transfer");
    return false;
  }
  payload_left_ = piece_.bytes;
  trailers_left_ = piece_.ends;
  state_ = State::kPayload;
  return true;
}

void Receiver::on_payload() {
  std::span<const uint8_t> some = buffered();
  some = some.first(std::min(some.size(), static_cast<size_t>(payload_left_)));
  begin_ += some.size();
  payload_left_ -= static_cast<int64_t>(some.size());
  if (payload_left_ == 0) state_ = State::kTrailers;
  if (sink_ == nullptr) return;
  if (!sink_->may_write()) {
    sink_->advance(static_cast<int64_t>(some.size()), true);
    return;
  }
  std::array<iovec, kRowsMax> rows;
  while (!some.empty()) {
    const size_t count = sink_->rows(rows, static_cast<int64_t>(some.size()));
    int64_t copied = 0;
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(rows[i].iov_base, some.data(), rows[i].iov_len);
      some = some.subspan(rows[i].iov_len);
      copied += static_cast<int64_t>(rows[i].iov_len);
    }
    sink_->advance(copied, false);
  }
}

bool Receiver::on_trailers(FrameHandler& handler) {
  if (sink_ != nullptr && sink_->waiting() != trailers_left_) {
    fail("it sent " + std::to_string(trailers_left_) + " trailers for " +
         std::to_string(sink_->waiting()) + " blocks");
    return false;
  }
  while (trailers_left_ > 0) {
    if (buffered().size() < wire::kTrailerBytes) return false;
    wire::Trailer trailer;
    if (!wire::decode(buffered().first<wire::kTrailerBytes>(), &trailer)) {
      fail("it sent a trailer of an unknown kind");
      return false;
    }
    begin_ += wire::kTrailerBytes;
    --trailers_left_;
    if (sink_ != nullptr) sink_->settle_next(trailer);
  }
  state_ = State::kHeader;
  const bool has_sink = sink_ != nullptr;
  sink_ = nullptr;
  if (has_sink) handler.on_piece_end(header_);
  return true;
}

void Receiver::forget(const Sink* sink) {
  if (sink_ == sink) sink_ = nullptr;
}

}  // namespace kvx
