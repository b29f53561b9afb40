// Cuts what a stream brings into frames; the payload of pieces goes straight into sinks.
//
// It knows nothing of transfers. It ends at the first byte that cannot belong to a frame, so what
// it hands on is within the limits of its type.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "agent/flows.h"
#include "agent/stream.h"
#include "kvx/wire.h"

namespace kvx {

class FrameHandler {
 public:
  virtual ~FrameHandler() = default;
  // Whether a frame of this type may come now.
  virtual bool accepts(const wire::Header& header) = 0;
  // True: it may, but only later; nothing is taken until is_paused() is over.
  virtual bool defers(const wire::Header& header) = 0;
  // A whole frame other than a piece. False: the peer breaks the protocol.
  virtual bool on_frame(const wire::Header& header, std::span<const uint8_t> body,
                        std::vector<UniqueFd>& fds) = 0;
  // Where the piece goes; null: nowhere, its transfer is over. Checked already: nothing.
  virtual Sink* sink_of(const wire::Header& header, const wire::Piece& piece, bool* is_wrong) = 0;
  // Takes no frame until somebody has decided about the last one; then receive() is called again.
  virtual bool is_paused() const = 0;
  // The piece's trailers were settled.
  virtual void on_piece_end(const wire::Header& header) = 0;
};

class Receiver {
 public:
  Receiver();

  // Receives and hands on, `budget` bytes or a little more. Positive: bytes; 0: there is no more
  // now; negative: the connection is over, failure() tells why.
  int64_t receive(Stream& stream, FrameHandler& handler, int64_t budget);
  const std::string& failure() const { return failure_; }
  bool has_buffered() const { return begin_ < end_; }
  // The sink is going away: what is left of its piece is thrown away.
  void forget(const Sink* sink);

 private:
  enum class State : uint8_t { kHeader, kBody, kPieceHeader, kPayload, kTrailers };

  bool step(FrameHandler& handler);
  bool on_header(FrameHandler& handler);
  bool on_body(FrameHandler& handler);
  bool on_piece_header(FrameHandler& handler);
  void on_payload();
  bool on_trailers(FrameHandler& handler);
  int64_t receive_payload(Stream& stream);
  int64_t fill(Stream& stream);
  int64_t fail(const std::string& why);
  int64_t ended_by(int64_t received, Stream& stream);
  std::span<const uint8_t> buffered() const {
    return std::span(buffer_).subspan(begin_, end_ - begin_);
  }

  std::vector<uint8_t> buffer_;
  size_t begin_ = 0;
  size_t end_ = 0;
  std::vector<uint8_t> scrap_;
  std::vector<uint8_t> body_;
  std::vector<UniqueFd> fds_;
  State state_ = State::kHeader;
  wire::Header header_;
  wire::Piece piece_;
  Sink* sink_ = nullptr;
  int64_t payload_left_ = 0;
  uint32_t trailers_left_ = 0;
  std::string failure_;
};

}  // namespace kvx
