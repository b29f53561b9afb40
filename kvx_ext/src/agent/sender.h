// What goes out on a stream: small frames first, then pieces of all sources in turn.
//
// A piece is announced, its rows are sent from where they lie, and its trailers follow when the
// last row has left: each says whether the bytes could still be read by then. Should they not, the
// rest of the piece is sent as zeros, so the frame stays whole and nothing else is read.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "agent/flows.h"
#include "agent/stream.h"
#include "kvx/wire.h"

namespace kvx {

class Sender {
 public:
  explicit Sender(int64_t piece_bytes) : piece_bytes_(piece_bytes) {}

  // `fd` (-1: none) is passed along; it is duplicated.
  void queue(wire::Type type, uint64_t id, std::span<const uint8_t> body, int fd = -1);
  void add(std::shared_ptr<Source> source);
  // Sends no more of it; what of its current piece is left goes out as zeros.
  void drop(const Source* source, Stream& stream);

  // Sends until there is nothing left, the socket is full, or about `budget` bytes are out.
  // Negative: the connection is over.
  int64_t send(Stream& stream, int64_t budget);
  bool has_work() const;
  int64_t queued_bytes() const { return queued_bytes_; }
  // Sources that came to their end, or were dropped because they might not be read any more, since
  // it was last asked.
  std::vector<std::shared_ptr<Source>> take_finished();

 private:
  struct Frame {
    std::vector<uint8_t> bytes;
    UniqueFd fd;
  };

  void prepare();
  void take_frames();
  void begin_piece();
  void end_piece();
  void blank_payload(Stream& stream);
  ssize_t send_some(Stream& stream);
  void consume(int64_t bytes);

  const int64_t piece_bytes_;
  std::deque<Frame> frames_;
  int64_t queued_bytes_ = 0;
  std::deque<std::shared_ptr<Source>> sources_;
  std::vector<std::shared_ptr<Source>> finished_;

  std::vector<uint8_t> head_;  // goes out before the payload
  size_t head_sent_ = 0;
  UniqueFd head_fd_;
  std::vector<iovec> payload_;
  size_t payload_at_ = 0;
  std::shared_ptr<Source> current_;
  uint32_t ends_ = 0;
  bool is_blank_ = false;
  bool lends_ = false;  // the payload
};

}  // namespace kvx
