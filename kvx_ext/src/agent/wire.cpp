#include "kvx/wire.h"

#include <algorithm>
#include <cassert>
#include <limits>

#include "agent/wire_bytes.h"

namespace kvx::wire {

namespace {

constexpr uint32_t kDoneFixedBytes = 16;
constexpr uint32_t kRegionBytes = 32;
constexpr uint32_t kFailureBytes = 12;
static_assert(sizeof(BlockFailure) == kFailureBytes && kIsWhole<BlockFailure>);

constexpr int64_t kInt64Max = std::numeric_limits<int64_t>::max();

struct Sizes {
  uint32_t min = 0;
  uint32_t max = 0;
};

// Behind the header. A type that does not exist has none: min is over max.
Sizes sizes_of(Type type) {
  constexpr auto kBlocksMax = static_cast<uint32_t>(kDescriptorsMax);
  switch (type) {
    case Type::kGreeting:
      return {0, kGreetingBytesMax};
    case Type::kMessage:
      return {0, kMessageBytesMax};
    case Type::kNote:
      return {0, kNoteBytesMax};
    case Type::kRead:
    case Type::kWrite:
    case Type::kPull:
      return {0, kRequestBytesMax};
    case Type::kPiece:
      return {kPieceBytes + 1, kPieceBytes + kPayloadBytesMax + kEndsMax * kTrailerBytes};
    case Type::kDone:
      return {kDoneFixedBytes,
              kDoneFixedBytes + kDoneTextMax +
                  kBlocksMax * static_cast<uint32_t>(kFailureBytes + sizeof(uint64_t))};
    case Type::kRegion:
      return {kRegionBytes, kRegionBytes};
    case Type::kCancel:
    case Type::kPing:
    case Type::kPong:
    case Type::kRegionGone:
      return {0, 0};
  }
  return {1, 0};
}

bool exists(Code code) { return code >= Code::kOk && code <= Code::kPeerLost; }

bool is_printable(uint8_t letter) { return letter >= 0x20 && letter < 0x7f; }

bool is_sound(const Piece& piece) {
  return piece.bytes >= 1 && piece.bytes <= kPayloadBytesMax && piece.ends <= kEndsMax &&
         piece.ends <= piece.bytes &&
         piece.position <= static_cast<uint64_t>(kInt64Max) - piece.bytes;
}

// Every block once, so that whoever counts them counts right.
bool is_sound(const std::vector<BlockFailure>& failures) {
  for (size_t i = 0; i < failures.size(); ++i) {
    if (failures[i].block >= kDescriptorsMax || !exists(failures[i].code)) return false;
    if (i > 0 && failures[i].block <= failures[i - 1].block) return false;
  }
  return true;
}

bool is_sound(const RegionNews& news) {
  const bool has_access =
      news.access >= RegionAccess::kPages && news.access <= RegionAccess::kForeign;
  return has_access && news.bytes > 0 && news.fd_offset >= 0 &&
         news.bytes <= kInt64Max - news.fd_offset &&
         news.base <= std::numeric_limits<uint64_t>::max() - static_cast<uint64_t>(news.bytes);
}

}  // namespace

uint32_t bytes_max(Type type) { return sizes_of(type).max; }

void encode(const Header& header, std::span<uint8_t, kHeaderBytes> target) {
  assert(header.bytes >= sizes_of(header.type).min && header.bytes <= sizes_of(header.type).max);
  assert((header.flags & (header.type == Type::kPiece ? ~kToInitiator : 0xff)) == 0);
  ByteWriter writer(target);
  writer.put(kMagic);
  writer.put(static_cast<uint8_t>(header.type));
  writer.put(header.flags);
  writer.put(uint16_t{0});
  writer.put(header.bytes);
  writer.put(uint32_t{0});
  writer.put(header.id);
}

bool decode(std::span<const uint8_t, kHeaderBytes> source, Header* header) {
  ByteReader reader(source);
  uint32_t magic = 0;
  uint8_t type = 0;
  uint16_t reserved = 0;
  uint32_t reserved_too = 0;
  if (!reader.take(&magic) || !reader.take(&type) || !reader.take(&header->flags) ||
      !reader.take(&reserved) || !reader.take(&header->bytes) || !reader.take(&reserved_too) ||
      !reader.take(&header->id)) {
    return false;
  }
  header->type = static_cast<Type>(type);
  const uint8_t flags_allowed = header->type == Type::kPiece ? kToInitiator : uint8_t{0};
  const Sizes sizes = sizes_of(header->type);
  return magic == kMagic && reserved == 0 && reserved_too == 0 &&
         (header->flags & ~flags_allowed) == 0 && header->bytes >= sizes.min &&
         header->bytes <= sizes.max;
}

void encode(const Piece& piece, std::span<uint8_t, kPieceBytes> target) {
  assert(is_sound(piece));
  ByteWriter writer(target);
  writer.put(piece.position);
  writer.put(piece.bytes);
  writer.put(piece.ends);
}

bool decode(std::span<const uint8_t, kPieceBytes> source, const Header& header, Piece* piece) {
  ByteReader reader(source);
  if (!reader.take(&piece->position) || !reader.take(&piece->bytes) || !reader.take(&piece->ends)) {
    return false;
  }
  return is_sound(*piece) &&
         kPieceBytes + piece->bytes + piece->ends * kTrailerBytes == header.bytes;
}

void encode(const Trailer& trailer, std::span<uint8_t, kTrailerBytes> target) {
  assert(exists(trailer.code));
  ByteWriter writer(target);
  writer.put(trailer.checksum);
  writer.put(trailer.code);
  writer.put(uint32_t{0});
}

bool decode(std::span<const uint8_t, kTrailerBytes> source, Trailer* trailer) {
  ByteReader reader(source);
  uint32_t reserved = 0;
  return reader.take(&trailer->checksum) && reader.take(&trailer->code) && reader.take(&reserved) &&
         exists(trailer->code) && reserved == 0;
}

std::vector<uint8_t> encode(const Done& done) {
  assert(exists(done.code) && is_sound(done.failures));
  assert(done.checksums.size() <= static_cast<size_t>(kDescriptorsMax));
  std::vector<uint8_t> text(done.message.begin(), done.message.end());
  text.resize(std::min<size_t>(text.size(), kDoneTextMax));
  std::replace_if(
      text.begin(), text.end(), [](uint8_t letter) { return !is_printable(letter); }, uint8_t{'?'});
  std::vector<uint8_t> body(kDoneFixedBytes + done.failures.size() * kFailureBytes +
                            done.checksums.size() * sizeof(uint64_t) + text.size());
  ByteWriter writer(body);
  writer.put(done.code);
  writer.put(static_cast<uint32_t>(text.size()));
  writer.put(static_cast<uint32_t>(done.failures.size()));
  writer.put(static_cast<uint32_t>(done.checksums.size()));
  writer.put_all(std::span(done.failures));
  writer.put_all(std::span(done.checksums));
  writer.put_all(std::span<const uint8_t>(text));
  assert(writer.is_full());
  return body;
}

bool decode(std::span<const uint8_t> body, Done* done) {
  ByteReader reader(body);
  uint32_t text_bytes = 0;
  uint32_t failures = 0;
  uint32_t checksums = 0;
  if (!reader.take(&done->code) || !reader.take(&text_bytes) || !reader.take(&failures) ||
      !reader.take(&checksums) || !exists(done->code) || text_bytes > kDoneTextMax ||
      failures > kDescriptorsMax || checksums > kDescriptorsMax) {
    return false;
  }
  std::vector<uint8_t> text;
  if (!reader.take_all(failures, &done->failures) ||
      !reader.take_all(checksums, &done->checksums) || !reader.take_all(text_bytes, &text)) {
    return false;
  }
  done->message.assign(text.begin(), text.end());
  return reader.left() == 0 && is_sound(done->failures) &&
         std::all_of(text.begin(), text.end(), is_printable);
}

std::vector<uint8_t> encode(const RegionNews& news) {
  assert(is_sound(news));
  std::vector<uint8_t> body(kRegionBytes);
  ByteWriter writer(body);
  writer.put(static_cast<uint32_t>(news.access));
  writer.put(news.id);
  writer.put(news.bytes);
  writer.put(news.fd_offset);
  writer.put(news.base);
  assert(writer.is_full());
  return body;
}

bool decode(std::span<const uint8_t> body, RegionNews* news) {
  ByteReader reader(body);
  uint32_t access = 0;
  if (!reader.take(&access) || !reader.take(&news->id) || !reader.take(&news->bytes) ||
      !reader.take(&news->fd_offset) || !reader.take(&news->base) || reader.left() != 0 ||
      access > std::numeric_limits<uint8_t>::max()) {
    return false;
  }
  news->access = static_cast<RegionAccess>(access);
  return is_sound(*news);
}

}  // namespace kvx::wire
