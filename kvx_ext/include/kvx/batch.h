// What a job is asked to do: one kind of work and parallel arrays with one entry a block.
//
//   kCopyIn   planes, ids      -> addresses          checksums are computed
//   kCopyOut  addresses        -> planes, ids        checksums are expected
//   kVerify   addresses                              checksums are expected
//   kRead     fds, offsets     -> addresses          checksums are expected; with planes each block
//                                                    goes straight on to planes, ids
//   kWrite    addresses        -> fds, offsets       `bytes` per block, then fdatasync of sync_fds
//
// Addresses are of host memory that the caller keeps until the job is quiesced.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "kvx/copy.h"
#include "kvx/status.h"

namespace kvx {

enum class JobKind : uint8_t { kCopyIn, kCopyOut, kVerify, kRead, kWrite };
inline constexpr int kJobKinds = 5;
[[nodiscard]] std::string_view job_kind_name(JobKind kind);

// The block index travels as int32 and the count shares a word with another one.
inline constexpr int64_t kBlocksMax = int64_t{1} << 30;

struct Batch {
  JobKind kind = JobKind::kVerify;
  int64_t block_bytes = 0;   // all but kWrite: of every block
  int64_t io_bytes = 0;      // kRead: bytes read a block, >= block_bytes; O_DIRECT wants 4096s
  PlaneSet planes{{}};       // kCopyIn, kCopyOut, kRead straight on to planes: block_bytes a block
  std::vector<int64_t> ids;  // block of the planes
  std::vector<int64_t> addresses;
  std::vector<uint8_t> keys;  // kKeyBytes a block; all but kWrite
  std::vector<uint64_t> checksums;
  std::vector<int32_t> fds;
  std::vector<int64_t> offsets;
  std::vector<int64_t> bytes;     // kWrite
  std::vector<int32_t> sync_fds;  // kWrite

  bool has_planes() const { return planes.block_bytes() > 0; }
  bool is_io() const { return kind == JobKind::kRead || kind == JobKind::kWrite; }
  int64_t blocks() const { return static_cast<int64_t>(addresses.size()); }
  int64_t bytes_of(int64_t block) const {
    return kind == JobKind::kWrite ? bytes[static_cast<size_t>(block)] : block_bytes;
  }
};

// kUsage naming the first argument that is wrong: lengths that differ, an address of zero, a
// negative id, offset or descriptor, bytes that are not positive.
Status validate(const Batch& batch);

// The same for planes as they come from the caller, before PlaneSet merges them.
Status validate(std::span<const Plane> planes);

}  // namespace kvx
