// One frame of each type and form, small, with a different value in every field.
#pragma once

#include <string>
#include <vector>

#include "wire_frames.h"

namespace kvx::wire {

struct Sample {
  std::string name;
  Bytes bytes;
};

inline Bytes counted(size_t count, uint8_t first) {
  Bytes bytes(count);
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(first + i);
  return bytes;
}

inline Request sample_request() {
  Request request;
  request.lease = {.id = 0x0102030405060708, .slot = 0x0a0b0c0d, .generation = 0x1112131415161718};
  request.deadline_ms = 10000;
  return request;
}

inline Bytes sample_read_indices() {
  Request request = sample_request();
  request.wants_checksums = true;
  request.indices = {3, 1, 0x00f00002};
  return frame(Type::kRead, 7, encode(request));
}

inline Bytes sample_write_one_shape() {
  Request request = sample_request();
  request.descriptors = {{.offset = 4096, .stride = 512, .count = 2, .bytes = 256},
                         {.offset = 65536, .stride = 512, .count = 2, .bytes = 256}};
  request.keys = counted(2 * kKeyBytes, 0x40);
  request.note = {'h', 'i'};
  return frame(Type::kWrite, 8, encode(request));
}

inline Bytes sample_read_each() {
  Request request = sample_request();
  request.descriptors = {{.offset = 1, .stride = 0, .count = 1, .bytes = 5},
                         {.offset = 9, .stride = 16, .count = 3, .bytes = 2}};
  return frame(Type::kRead, 9, encode(request));
}

inline Bytes sample_pull() {
  Request request = sample_request();
  request.wants_checksums = true;
  request.indices = {0, 5};
  request.note = {'n'};
  PullOrigin origin{.region = 0x21222324, .lease_slot = 0x31323334, .lease_generation = 0x77};
  origin.blocks = {{.offset = 0, .stride = 0, .count = 1, .bytes = 8},
                   {.offset = 8, .stride = 0, .count = 1, .bytes = 8}};
  origin.checksums = {0xaaaaaaaaaaaaaaaa, 0xbbbbbbbbbbbbbbbb};
  return frame(Type::kPull, 10, encode(request, origin));
}

inline Bytes sample_piece() {
  const std::vector<Trailer> trailers = {{.checksum = 0x8182838485868788, .code = Code::kOk},
                                         {.checksum = 0, .code = Code::kStale}};
  const Bytes payload = counted(5, 0xe0);
  return frame(Type::kPiece, 11,
               piece_body({.position = 1 << 20, .bytes = 5, .ends = 2}, payload, trailers),
               kToInitiator);
}

inline Bytes sample_done() {
  Done done{.code = Code::kOk, .message = "1 of 2 blocks", .failures = {}, .checksums = {}};
  done.failures = {{.block = 1, .code = Code::kCorrupt, .error_number = -5}};
  done.checksums = {1, 2};
  return frame(Type::kDone, 12, encode(done));
}

inline Bytes sample_region() {
  const RegionNews news{.access = RegionAccess::kMapped,
                        .id = 4,
                        .bytes = 1 << 30,
                        .fd_offset = 8192,
                        .base = 0x7f0000001000};
  return frame(Type::kRegion, 4, encode(news));
}

inline std::vector<Sample> samples() {
  return {{"greeting", frame(Type::kGreeting, 0, {1, 2, 3})},
          {"message", frame(Type::kMessage, 0, {0xff})},
          {"note", frame(Type::kNote, 0, {'x', 'y'})},
          {"read_indices", sample_read_indices()},
          {"read_each", sample_read_each()},
          {"write_one_shape", sample_write_one_shape()},
          {"pull", sample_pull()},
          {"piece", sample_piece()},
          {"done", sample_done()},
          {"cancel", frame(Type::kCancel, 7, {})},
          {"ping", frame(Type::kPing, 0xfedcba9876543210, {})},
          {"pong", frame(Type::kPong, 1, {})},
          {"region", sample_region()},
          {"region_gone", frame(Type::kRegionGone, 4, {})}};
}

}  // namespace kvx::wire
