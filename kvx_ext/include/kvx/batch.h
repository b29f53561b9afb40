// What a job is asked to do: one kind of work and parallel arrays with one entry a block.
//
//   kCopyIn   planes, ids      -> addresses          checksums are computed
//   kCopyOut  addresses        -> planes, ids        checksums are expected
//   kVerify   addresses                              checksums are expected
//   kRead     fds, offsets     -> addresses          checksums are expected; with planes each block
//                                                    goes straight on to planes, ids
//   kWrite    addresses        -> fds, offsets       `bytes` per block, then fdatasync of sync_fds
//   kFetch    device_addresses -> addresses          checksums are expected; on to planes as kRead
//   kDeviceIn   planes, ids    -> device_addresses   copied on the device: nothing is checksummed
//   kDeviceOut  device_addresses -> planes, ids      the same
//
// Addresses are of host memory, device_addresses of the engine's device; planes are of the device
// with `is_on_device` (kCopyIn, kCopyOut, kRead) and for the last two. The caller keeps the memory
// until the job is quiesced. Blocks bound for the device are verified in host memory first: what is
// wrong is never sent.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "kvx/copy.h"
#include "kvx/layer_progress.h"
#include "kvx/status.h"

namespace kvx {

enum class JobKind : uint8_t {
  kCopyIn,
  kCopyOut,
  kVerify,
  kRead,
  kWrite,
  kFetch,
  kDeviceIn,
  kDeviceOut,
};
inline constexpr int kJobKinds = 8;
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

  bool is_on_device = false;
  std::vector<int64_t> device_addresses;
  std::shared_ptr<StreamMark> after;  // device copies wait for it; null: they need not
  // Told how far the job is, if given. Positive `layer_planes`: kCopyOut and kRead on the device
  // bring that many planes of all blocks before the next ones, once every block is verified.
  std::shared_ptr<LayerProgress> progress;
  int layer_planes = 0;

  bool has_planes() const { return planes.block_bytes() > 0; }
  // Who copies from or to the planes: the device's copies, or the copy threads.
  bool has_planes_on_device() const { return is_on_device || is_inside_device(); }
  bool has_planes_on_host() const { return has_planes() && !has_planes_on_device(); }
  bool is_io() const { return kind == JobKind::kRead || kind == JobKind::kWrite; }
  // Copied on the device only.
  bool is_inside_device() const {
    return kind == JobKind::kDeviceIn || kind == JobKind::kDeviceOut;
  }
  // From the device into host memory, where the copy threads take over.
  bool is_inbound() const {
    return kind == JobKind::kFetch || (kind == JobKind::kCopyIn && is_on_device);
  }
  // From host memory, once verified, to the device.
  bool is_outbound() const {
    return (kind == JobKind::kCopyOut || kind == JobKind::kRead) && is_on_device;
  }
  bool needs_device() const { return is_inside_device() || is_inbound() || is_outbound(); }
  // Something else than the copy threads touches the blocks first.
  bool is_begun_elsewhere() const { return kind == JobKind::kRead || is_inbound(); }
  bool is_layered() const { return layer_planes > 0 && is_outbound(); }

  int64_t blocks() const {
    return static_cast<int64_t>(is_inside_device() ? device_addresses.size() : addresses.size());
  }
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
