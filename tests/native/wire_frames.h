// What holds of every frame, whoever made it: used by the tests of the wire and by its fuzzing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "check.h"
#include "kvx/checksum.h"
#include "kvx/wire.h"

namespace kvx::wire {

using Bytes = std::vector<uint8_t>;

inline constexpr size_t kBlocksMax = static_cast<size_t>(kDescriptorsMax);

inline Bytes frame(Type type, uint64_t id, const Bytes& body, uint8_t flags = 0) {
  Bytes whole(kHeaderBytes);
  encode(Header{type, flags, static_cast<uint32_t>(body.size()), id},
         std::span<uint8_t, kHeaderBytes>(whole.data(), kHeaderBytes));
  whole.insert(whole.end(), body.begin(), body.end());
  return whole;
}

inline Bytes piece_body(const Piece& piece, std::span<const uint8_t> payload,
                        std::span<const Trailer> trailers) {
  Bytes body(kPieceBytes);
  encode(piece, std::span<uint8_t, kPieceBytes>(body.data(), kPieceBytes));
  body.insert(body.end(), payload.begin(), payload.end());
  for (const Trailer& trailer : trailers) {
    uint8_t bytes[kTrailerBytes];
    encode(trailer, bytes);
    body.insert(body.end(), bytes, bytes + kTrailerBytes);
  }
  return body;
}

inline bool is_same(std::span<const uint8_t> one, std::span<const uint8_t> other) {
  return std::ranges::equal(one, other);
}

inline void check_request(const Request& request) {
  const size_t blocks = request.indices.size() + request.descriptors.size();
  CHECK(request.indices.empty() || request.descriptors.empty());
  CHECK(blocks >= 1 && blocks <= kBlocksMax && request.note.size() <= kNoteBytesMax);
  CHECK(request.keys.empty() || request.keys.size() == blocks * kKeyBytes);
}

inline bool check_pull(std::span<const uint8_t> body) {
  Request request;
  PullOrigin origin;
  if (!decode(body, &request, &origin)) return false;
  check_request(request);
  const size_t blocks = request.indices.size() + request.descriptors.size();
  CHECK(origin.blocks.size() == blocks);
  CHECK(origin.checksums.empty() || origin.checksums.size() == blocks);
  CHECK(is_same(encode(request, origin), body));
  return true;
}

inline bool check_piece(const Header& header, std::span<const uint8_t> body) {
  Piece piece;
  if (body.size() < kPieceBytes) return false;
  if (!decode(body.first<kPieceBytes>(), header, &piece)) return false;
  CHECK(piece.bytes >= 1 && piece.bytes <= kPayloadBytesMax && piece.ends <= kEndsMax);
  CHECK(piece.position + piece.bytes <= static_cast<uint64_t>(INT64_MAX));
  CHECK(body.size() == kPieceBytes + piece.bytes + piece.ends * kTrailerBytes);
  std::vector<Trailer> trailers(piece.ends);
  for (size_t i = 0; i < trailers.size(); ++i) {
    const auto bytes = body.subspan(kPieceBytes + piece.bytes + i * kTrailerBytes, kTrailerBytes);
    if (!decode(bytes.first<kTrailerBytes>(), &trailers[i])) return false;
    CHECK(trailers[i].code >= Code::kOk && trailers[i].code <= Code::kPeerLost);
  }
  CHECK(is_same(piece_body(piece, body.subspan(kPieceBytes, piece.bytes), trailers), body));
  return true;
}

inline bool check_done(std::span<const uint8_t> body) {
  Done done;
  if (!decode(body, &done)) return false;
  CHECK(done.code >= Code::kOk && done.code <= Code::kPeerLost);
  CHECK(done.message.size() <= kDoneTextMax);
  CHECK(done.failures.size() <= kBlocksMax && done.checksums.size() <= kBlocksMax);
  for (size_t i = 0; i < done.failures.size(); ++i) {
    CHECK(done.failures[i].block < kDescriptorsMax);
    CHECK(i == 0 || done.failures[i].block > done.failures[i - 1].block);
  }
  CHECK(is_same(encode(done), body));
  return true;
}

inline bool check_body(const Header& header, std::span<const uint8_t> body) {
  switch (header.type) {
    case Type::kRead:
    case Type::kWrite: {
      Request request;
      if (!decode(body, &request)) return false;
      check_request(request);
      CHECK(is_same(encode(request), body));
      return true;
    }
    case Type::kPull:
      return check_pull(body);
    case Type::kPiece:
      return check_piece(header, body);
    case Type::kDone:
      return check_done(body);
    case Type::kRegion: {
      RegionNews news;
      if (!decode(body, &news)) return false;
      CHECK(news.bytes > 0 && news.fd_offset >= 0 && news.bytes + news.fd_offset > 0);
      CHECK(is_same(encode(news), body));
      return true;
    }
    default:
      return true;  // opaque or empty
  }
}

// Whether `bytes` are exactly one frame; aborts when what was decoded is over a limit, or is not
// what encode() makes of it.
inline bool is_frame(std::span<const uint8_t> bytes) {
  Header header;
  if (bytes.size() < kHeaderBytes || !decode(bytes.first<kHeaderBytes>(), &header)) return false;
  CHECK(header.bytes <= bytes_max(header.type));
  if (bytes.size() - kHeaderBytes != header.bytes) return false;
  const auto body = bytes.subspan(kHeaderBytes);
  if (!check_body(header, body)) return false;
  CHECK(
      is_same(frame(header.type, header.id, Bytes(body.begin(), body.end()), header.flags), bytes));
  return true;
}

}  // namespace kvx::wire
