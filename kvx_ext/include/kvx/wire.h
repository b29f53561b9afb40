// The frames that agents exchange over a stream: pure encoding and decoding, version 1.
//
// See docs/formats/wire.md. Everything here is safe for any bytes: a decoder returns false for what
// is not exactly a frame of its kind within its limits, never reads outside its argument, and makes
// room for at most four times what the argument holds. Where it returned false, the result is in no
// particular state.
// A value has one encoding: whatever decodes is what encode() would make of the result. All numbers
// are little-endian. Every frame is a header and `bytes` more.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "kvx/descriptor.h"
#include "kvx/lease_table.h"

namespace kvx::wire {

inline constexpr uint32_t kMagic = 0x3178766b;  // "kvx1"
inline constexpr size_t kHeaderBytes = 24;
inline constexpr size_t kPieceBytes = 16;    // of the piece's own header, within the body
inline constexpr size_t kTrailerBytes = 16;  // a block that ends in the piece

inline constexpr uint32_t kGreetingBytesMax = 16 << 10;
inline constexpr uint32_t kMessageBytesMax = 8 << 20;
inline constexpr uint32_t kNoteBytesMax = 64 << 10;
inline constexpr uint32_t kRequestBytesMax = 96
                                             << 20;    // kDescriptorsMax blocks in the longest form
inline constexpr uint32_t kPayloadBytesMax = 4 << 20;  // of a piece
inline constexpr uint32_t kEndsMax = 4096;             // blocks that end in one piece
inline constexpr uint32_t kDoneTextMax = 512;

enum class Type : uint8_t {
  kGreeting = 1,
  kMessage = 2,
  kNote = 3,
  kRead = 4,   // Request
  kWrite = 5,  // Request; pieces follow
  kPull = 6,   // Request with a PullOrigin: the receiver copies it from memory of this host
  kPiece = 7,
  kDone = 8,    // the receiver of a request has ended it
  kCancel = 9,  // its initiator wants no more of it; answered by kDone
  kPing = 10,
  kPong = 11,
  kRegion = 12,  // a region of the sender, with a descriptor when it can be mapped; unix only
  kRegionGone = 13,
};

// Header::flags of kPiece: the transfer was begun by the receiver of the piece (it is a read).
inline constexpr uint8_t kToInitiator = 1;

struct Header {
  Type type = Type::kPing;
  uint8_t flags = 0;
  uint32_t bytes = 0;  // behind the header
  uint64_t id = 0;     // of the transfer, as its initiator numbers it; of the ping; of the region
};

void encode(const Header& header, std::span<uint8_t, kHeaderBytes> target);
// False: wrong magic, unknown type or flags, or `bytes` outside the limits of its type.
[[nodiscard]] bool decode(std::span<const uint8_t, kHeaderBytes> source, Header* header);

// Most bytes behind the header of a frame of this type.
[[nodiscard]] uint32_t bytes_max(Type type);

struct Request {
  LeaseRef lease;
  uint32_t deadline_ms = 0;
  bool wants_checksums = false;  // false: the initiator knows them
  // One of the two, of 1..kDescriptorsMax: blocks of the lease by number, or descriptors within a
  // range lease. Neither is held against a lease or a region here.
  std::vector<uint32_t> indices;
  std::vector<Descriptor> descriptors;
  std::vector<uint8_t> keys;  // kKeyBytes a block, or none: the lease's, else zeros
  std::vector<uint8_t> note;  // at most kNoteBytesMax
};

// kPull: where the receiver finds the bytes of a write.
struct PullOrigin {
  uint32_t region = 0;
  uint32_t lease_slot = 0;  // a lease of the sender on its own memory, for as long as this lasts
  uint64_t lease_generation = 0;
  std::vector<Descriptor> blocks;   // as many as the request names
  std::vector<uint64_t> checksums;  // expected, or none
};

[[nodiscard]] std::vector<uint8_t> encode(const Request& request);
[[nodiscard]] bool decode(std::span<const uint8_t> body, Request* request);
[[nodiscard]] std::vector<uint8_t> encode(const Request& request, const PullOrigin& origin);
[[nodiscard]] bool decode(std::span<const uint8_t> body, Request* request, PullOrigin* origin);

// A run of a transfer's canonical bytes: this, the payload, then a Trailer for each block that ends
// in it. Header::bytes is the sum of the three.
struct Piece {
  uint64_t position = 0;  // in the canonical bytes of the whole transfer; pieces come in order
  uint32_t bytes = 0;     // payload, 1..kPayloadBytesMax
  uint32_t ends = 0;      // blocks, 0..kEndsMax, no more than bytes
};
void encode(const Piece& piece, std::span<uint8_t, kPieceBytes> target);
// False also when the sizes do not add up to `header.bytes`.
[[nodiscard]] bool decode(std::span<const uint8_t, kPieceBytes> source, const Header& header,
                          Piece* piece);

struct Trailer {
  uint64_t checksum = 0;  // 0 when the initiator knows it
  Code code = Code::kOk;  // kStale: the lease ended while the block was being sent
};
void encode(const Trailer& trailer, std::span<uint8_t, kTrailerBytes> target);
// False for a code that does not exist.
[[nodiscard]] bool decode(std::span<const uint8_t, kTrailerBytes> source, Trailer* trailer);

struct BlockFailure {
  uint32_t block = 0;
  Code code = Code::kOk;
  int32_t error_number = 0;
};
struct Done {
  Code code = Code::kOk;  // of the blocks not named below
  std::string message;    // printable ASCII, at most kDoneTextMax bytes; encode() makes it so
  std::vector<BlockFailure> failures;  // ascending by block, each once
  std::vector<uint64_t> checksums;     // of a pull: one a block, or none
};
[[nodiscard]] std::vector<uint8_t> encode(const Done& done);
[[nodiscard]] bool decode(std::span<const uint8_t> body, Done* done);

enum class RegionAccess : uint8_t {
  kPages = 1,    // the page of leases; a descriptor comes with it
  kMapped = 2,   // a sealed memfd; a descriptor comes with it
  kForeign = 3,  // private memory of the sender, at `base`
};
struct RegionNews {
  RegionAccess access = RegionAccess::kForeign;
  uint32_t id = 0;
  int64_t bytes = 0;      // positive
  int64_t fd_offset = 0;  // not negative
  uint64_t base = 0;
};
[[nodiscard]] std::vector<uint8_t> encode(const RegionNews& news);
[[nodiscard]] bool decode(std::span<const uint8_t> body, RegionNews* news);

}  // namespace kvx::wire
