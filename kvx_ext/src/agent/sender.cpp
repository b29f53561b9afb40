#include "agent/sender.h"

#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace kvx {

namespace {

constexpr size_t kRowsAtOnce = 512;
constexpr size_t kHeadBytes = 64 << 10;
// What a waiting frame takes besides its bytes; of a pong, most of it.
constexpr size_t kFrameOverheadBytes = 128;
// Referring to pages costs about 50 ns each, copying 4 KiB five times that; but a row that is
// smaller than a page costs as much as a whole one.
constexpr uint32_t kLentBytes = 128 << 10;
constexpr size_t kLentRowBytes = 16 << 10;
constexpr std::array<uint8_t, 64 << 10> kBlank{};

int64_t cost_of(size_t bytes) { return static_cast<int64_t>(bytes + kFrameOverheadBytes); }

void append_header(std::vector<uint8_t>& target, const wire::Header& header) {
  const size_t at = target.size();
  target.resize(at + wire::kHeaderBytes);
  wire::encode(header, std::span(target).subspan(at).first<wire::kHeaderBytes>());
}

}  // namespace

void Sender::queue(wire::Type type, uint64_t id, std::span<const uint8_t> body, int fd) {
  Frame frame;
  frame.bytes.reserve(wire::kHeaderBytes + body.size());
  append_header(frame.bytes, {.type = type, .bytes = static_cast<uint32_t>(body.size()), .id = id});
  frame.bytes.insert(frame.bytes.end(), body.begin(), body.end());
  if (fd >= 0) frame.fd = UniqueFd(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  queued_bytes_ += cost_of(frame.bytes.size());
  frames_.push_back(std::move(frame));
}

void Sender::add(std::shared_ptr<Source> source) { sources_.push_back(std::move(source)); }

void Sender::drop(const Source* source, Stream& stream) {
  std::erase_if(sources_, [&](const auto& one) { return one.get() == source; });
  if (current_.get() == source && !is_blank_) blank_payload(stream);
}

bool Sender::has_work() const {
  return head_sent_ < head_.size() || payload_at_ < payload_.size() || current_ != nullptr ||
         !frames_.empty() || !sources_.empty();
}

std::vector<std::shared_ptr<Source>> Sender::take_finished() {
  return std::exchange(finished_, {});
}

// The same number of bytes, of nothing.
void Sender::blank_payload(Stream& stream) {
  stream.drop_lent();
  is_blank_ = true;
  lends_ = false;
  std::vector<iovec> blank;
  for (size_t i = payload_at_; i < payload_.size(); ++i) {
    for (size_t left = payload_[i].iov_len; left > 0;) {
      const size_t some = std::min(left, kBlank.size());
      blank.push_back({const_cast<uint8_t*>(kBlank.data()), some});
      left -= some;
    }
  }
  payload_ = std::move(blank);
  payload_at_ = 0;
}

void Sender::take_frames() {
  if (head_.empty() && !frames_.empty() && frames_.front().fd) {
    head_fd_ = std::move(frames_.front().fd);
    head_ = std::move(frames_.front().bytes);
    queued_bytes_ -= cost_of(head_.size());
    frames_.pop_front();
    return;
  }
  while (!frames_.empty() && !frames_.front().fd && head_.size() < kHeadBytes) {
    const std::vector<uint8_t>& bytes = frames_.front().bytes;
    head_.insert(head_.end(), bytes.begin(), bytes.end());
    queued_bytes_ -= cost_of(bytes.size());
    frames_.pop_front();
  }
}

void Sender::begin_piece() {
  if (head_fd_ || sources_.empty() || head_.size() >= kHeadBytes) return;
  if (!frames_.empty()) return;  // one with a descriptor comes first
  while (!sources_.empty()) {
    std::shared_ptr<Source> source = std::move(sources_.front());
    sources_.pop_front();
    if (source->may_read() != Code::kOk) {
      finished_.push_back(std::move(source));
      continue;
    }
    payload_.clear();
    payload_at_ = 0;
    const wire::Piece piece = source->next(piece_bytes_, &payload_);
    append_header(head_, {.type = wire::Type::kPiece,
                          .flags = source->is_to_initiator() ? wire::kToInitiator : uint8_t{0},
                          .bytes = static_cast<uint32_t>(wire::kPieceBytes + piece.bytes +
                                                         piece.ends * wire::kTrailerBytes),
                          .id = source->id()});
    const size_t at = head_.size();
    head_.resize(at + wire::kPieceBytes);
    wire::encode(piece, std::span(head_).subspan(at).first<wire::kPieceBytes>());
    ends_ = piece.ends;
    is_blank_ = false;
    lends_ = source->is_kept() && piece.bytes >= kLentBytes &&
             piece.bytes / payload_.size() >= kLentRowBytes;
    current_ = std::move(source);
    return;
  }
}

// Its last row has left: the trailers, and what becomes of the source.
void Sender::end_piece() {
  std::vector<wire::Trailer> trailers = current_->trailers();
  for (wire::Trailer& trailer : trailers) {
    if (is_blank_ && trailer.code == Code::kOk) trailer.code = Code::kStale;
    const size_t at = head_.size();
    head_.resize(at + wire::kTrailerBytes);
    wire::encode(trailer, std::span(head_).subspan(at).first<wire::kTrailerBytes>());
  }
  if (current_->is_at_end() || is_blank_) {
    finished_.push_back(std::move(current_));
  } else {
    sources_.push_back(std::move(current_));
  }
  current_ = nullptr;
}

void Sender::prepare() {
  if (head_sent_ < head_.size() || payload_at_ < payload_.size()) return;
  head_.clear();
  head_sent_ = 0;
  if (current_ != nullptr) end_piece();
  take_frames();
  begin_piece();
}

void Sender::consume(int64_t bytes) {
  auto left = static_cast<size_t>(bytes);
  const size_t of_head = std::min(left, head_.size() - head_sent_);
  head_sent_ += of_head;
  left -= of_head;
  while (left > 0) {
    iovec& row = payload_[payload_at_];
    const size_t some = std::min(left, row.iov_len);
    row.iov_base = static_cast<uint8_t*>(row.iov_base) + some;
    row.iov_len -= some;
    left -= some;
    if (row.iov_len == 0) ++payload_at_;
  }
}

ssize_t Sender::send_some(Stream& stream) {
  std::array<iovec, kRowsAtOnce + 1> rows;
  size_t count = 0;
  const bool has_head = head_sent_ < head_.size();
  if (has_head) rows[count++] = {head_.data() + head_sent_, head_.size() - head_sent_};
  if (!has_head && lends_ && payload_at_ < payload_.size()) {
    const ssize_t lent = stream.lend(std::span(payload_).subspan(payload_at_));
    if (lent != -ENOTSUP) return lent;
    lends_ = false;
  }
  for (size_t i = payload_at_; !lends_ && i < payload_.size() && count < rows.size(); ++i) {
    rows[count++] = payload_[i];
  }
  if (count == 0) return 0;
  return stream.send(std::span(rows).first(count), head_fd_.get());
}

int64_t Sender::send(Stream& stream, int64_t budget) {
  int64_t total = 0;
  while (total < budget) {
    prepare();
    if (current_ != nullptr && !is_blank_ && current_->may_read() != Code::kOk) {
      blank_payload(stream);
    }
    const ssize_t sent = send_some(stream);
    if (sent == 0 || sent == -EAGAIN) return total;
    if (sent < 0) return sent;
    head_fd_.reset();
    consume(sent);
    total += sent;
  }
  return total;
}

}  // namespace kvx
