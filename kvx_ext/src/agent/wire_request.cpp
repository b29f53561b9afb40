// The body of a request: which blocks of which lease, and for a pull, where its bytes are.
#include <algorithm>
#include <cassert>

#include "agent/wire_bytes.h"
#include "kvx/checksum.h"
#include "kvx/wire.h"

namespace kvx::wire {

namespace {

constexpr size_t kRequestFixedBytes = 40;
constexpr size_t kOriginFixedBytes = 16;
constexpr size_t kBlocksMax = static_cast<size_t>(kDescriptorsMax);

// Bits of the fixed part.
constexpr uint8_t kWantsChecksums = 1;
constexpr uint8_t kHasKeys = 2;
constexpr uint8_t kHasChecksums = 4;  // expected, in the origin
constexpr uint8_t kAllBits = kWantsChecksums | kHasKeys | kHasChecksums;

// How blocks are named. One shape and an offset a block is what a cache of equal blocks asks for,
// and a quarter of the bytes; it has to be used wherever it serves, so a request has one encoding.
enum class Naming : uint8_t {
  kNone = 0,
  kIndices = 1,   // uint32 a block
  kOneShape = 2,  // stride, count, bytes; then int64 offset a block
  kEach = 3,      // offset, stride, count, bytes a block
};

static_assert(sizeof(Descriptor) == 4 * sizeof(int64_t) && kIsWhole<Descriptor>);
// The longest form of both sides fits.
static_assert(kRequestFixedBytes + kOriginFixedBytes +
                  kBlocksMax * (2 * sizeof(Descriptor) + kKeyBytes + sizeof(uint64_t)) +
                  kNoteBytesMax <=
              kRequestBytesMax);

struct Fixed {
  LeaseRef lease;
  uint32_t deadline_ms = 0;
  uint32_t blocks = 0;
  uint32_t note_bytes = 0;
  uint8_t bits = 0;
  Naming naming = Naming::kNone;
  Naming origin = Naming::kNone;
};

Naming naming_of(std::span<const Descriptor> descriptors) {
  const auto is_of_first_shape = [&](const Descriptor& one) {
    const Descriptor& first = descriptors[0];
    return one.stride == first.stride && one.count == first.count && one.bytes == first.bytes;
  };
  return std::all_of(descriptors.begin(), descriptors.end(), is_of_first_shape) ? Naming::kOneShape
                                                                                : Naming::kEach;
}

size_t bytes_of(Naming naming, size_t blocks) {
  switch (naming) {
    case Naming::kIndices:
      return blocks * sizeof(uint32_t);
    case Naming::kOneShape:
      return 3 * sizeof(int64_t) + blocks * sizeof(int64_t);
    case Naming::kEach:
      return blocks * sizeof(Descriptor);
    case Naming::kNone:
      break;
  }
  return 0;
}

void put_descriptors(Naming naming, std::span<const Descriptor> descriptors, ByteWriter* writer) {
  if (naming == Naming::kEach) return writer->put_all(descriptors);
  writer->put(descriptors[0].stride);
  writer->put(descriptors[0].count);
  writer->put(descriptors[0].bytes);
  for (const Descriptor& one : descriptors) writer->put(one.offset);
}

bool take_descriptors(Naming naming, size_t blocks, ByteReader* reader,
                      std::vector<Descriptor>* descriptors) {
  if (naming == Naming::kEach) {
    return reader->take_all(blocks, descriptors) && naming_of(*descriptors) == naming;
  }
  Descriptor shape;
  std::vector<int64_t> offsets;
  if (naming != Naming::kOneShape || !reader->take(&shape.stride) || !reader->take(&shape.count) ||
      !reader->take(&shape.bytes) || !reader->take_all(blocks, &offsets)) {
    return false;
  }
  descriptors->assign(blocks, shape);
  for (size_t i = 0; i < blocks; ++i) (*descriptors)[i].offset = offsets[i];
  return true;
}

void put_fixed(const Fixed& fixed, ByteWriter* writer) {
  writer->put(fixed.lease.id);
  writer->put(fixed.lease.generation);
  writer->put(fixed.lease.slot);
  writer->put(fixed.deadline_ms);
  writer->put(fixed.blocks);
  writer->put(fixed.note_bytes);
  writer->put(fixed.bits);
  writer->put(fixed.naming);
  writer->put(fixed.origin);
  writer->put(uint8_t{0});
  writer->put(uint32_t{0});
}

bool take_fixed(ByteReader* reader, Fixed* fixed) {
  uint8_t reserved = 0;
  uint32_t reserved_too = 0;
  return reader->take(&fixed->lease.id) && reader->take(&fixed->lease.generation) &&
         reader->take(&fixed->lease.slot) && reader->take(&fixed->deadline_ms) &&
         reader->take(&fixed->blocks) && reader->take(&fixed->note_bytes) &&
         reader->take(&fixed->bits) && reader->take(&fixed->naming) &&
         reader->take(&fixed->origin) && reader->take(&reserved) && reader->take(&reserved_too) &&
         reserved == 0 && reserved_too == 0 && (fixed->bits & ~kAllBits) == 0 &&
         fixed->blocks >= 1 && fixed->blocks <= kBlocksMax && fixed->note_bytes <= kNoteBytesMax;
}

Fixed fixed_of(const Request& request, const PullOrigin* origin) {
  const size_t blocks = std::max(request.indices.size(), request.descriptors.size());
  assert(request.indices.empty() != request.descriptors.empty() && blocks <= kBlocksMax);
  assert(request.keys.empty() || request.keys.size() == blocks * kKeyBytes);
  assert(request.note.size() <= kNoteBytesMax);
  Fixed fixed{.lease = request.lease,
              .deadline_ms = request.deadline_ms,
              .blocks = static_cast<uint32_t>(blocks),
              .note_bytes = static_cast<uint32_t>(request.note.size())};
  fixed.naming = request.descriptors.empty() ? Naming::kIndices : naming_of(request.descriptors);
  if (request.wants_checksums) fixed.bits |= kWantsChecksums;
  if (!request.keys.empty()) fixed.bits |= kHasKeys;
  if (origin == nullptr) return fixed;
  assert(origin->blocks.size() == blocks);
  assert(origin->checksums.empty() || origin->checksums.size() == blocks);
  fixed.origin = naming_of(origin->blocks);
  if (!origin->checksums.empty()) fixed.bits |= kHasChecksums;
  return fixed;
}

size_t bytes_of(const Request& request, const PullOrigin* origin, const Fixed& fixed) {
  size_t bytes = kRequestFixedBytes + bytes_of(fixed.naming, fixed.blocks) + request.keys.size() +
                 request.note.size();
  if (origin != nullptr) {
    bytes += kOriginFixedBytes + bytes_of(fixed.origin, fixed.blocks) +
             origin->checksums.size() * sizeof(uint64_t);
  }
  return bytes;
}

std::vector<uint8_t> encode_both(const Request& request, const PullOrigin* origin) {
  const Fixed fixed = fixed_of(request, origin);
  std::vector<uint8_t> body(bytes_of(request, origin, fixed));
  ByteWriter writer(body);
  put_fixed(fixed, &writer);
  writer.put_all(std::span(request.indices));
  if (!request.descriptors.empty()) put_descriptors(fixed.naming, request.descriptors, &writer);
  writer.put_all(std::span(request.keys));
  if (origin != nullptr) {
    writer.put(origin->lease_generation);
    writer.put(origin->region);
    writer.put(origin->lease_slot);
    put_descriptors(fixed.origin, origin->blocks, &writer);
    writer.put_all(std::span(origin->checksums));
  }
  writer.put_all(std::span(request.note));
  assert(writer.is_full());
  return body;
}

bool take_origin(const Fixed& fixed, ByteReader* reader, PullOrigin* origin) {
  return reader->take(&origin->lease_generation) && reader->take(&origin->region) &&
         reader->take(&origin->lease_slot) &&
         take_descriptors(fixed.origin, fixed.blocks, reader, &origin->blocks) &&
         reader->take_all((fixed.bits & kHasChecksums) != 0 ? fixed.blocks : 0, &origin->checksums);
}

// `origin` is null when there may be none.
bool decode_both(std::span<const uint8_t> body, Request* request, PullOrigin* origin) {
  ByteReader reader(body);
  Fixed fixed;
  if (!take_fixed(&reader, &fixed)) return false;
  if ((origin != nullptr) != (fixed.origin != Naming::kNone)) return false;
  if (origin == nullptr && (fixed.bits & kHasChecksums) != 0) return false;
  request->lease = fixed.lease;
  request->deadline_ms = fixed.deadline_ms;
  request->wants_checksums = (fixed.bits & kWantsChecksums) != 0;
  request->indices.clear();
  request->descriptors.clear();
  const bool has_blocks =
      fixed.naming == Naming::kIndices
          ? reader.take_all(fixed.blocks, &request->indices)
          : take_descriptors(fixed.naming, fixed.blocks, &reader, &request->descriptors);
  const size_t key_bytes = (fixed.bits & kHasKeys) != 0 ? fixed.blocks * kKeyBytes : 0;
  return has_blocks && reader.take_all(key_bytes, &request->keys) &&
         (origin == nullptr || take_origin(fixed, &reader, origin)) &&
         reader.take_all(fixed.note_bytes, &request->note) && reader.left() == 0;
}

}  // namespace

std::vector<uint8_t> encode(const Request& request) { return encode_both(request, nullptr); }

std::vector<uint8_t> encode(const Request& request, const PullOrigin& origin) {
  return encode_both(request, &origin);
}

bool decode(std::span<const uint8_t> body, Request* request) {
  return decode_both(body, request, nullptr);
}

bool decode(std::span<const uint8_t> body, Request* request, PullOrigin* origin) {
  return decode_both(body, request, origin);
}

}  // namespace kvx::wire
