#include "kvx/batch.h"

#include <string>

#include "kvx/checksum.h"

namespace kvx {

namespace {

Status wrong(std::string what) { return {Code::kUsage, std::move(what)}; }

Status check_length(const char* name, size_t length, int64_t blocks) {
  if (length == static_cast<size_t>(blocks)) return Status::Ok();
  return wrong(std::string(name) + " has " + std::to_string(length) + " entries for " +
               std::to_string(blocks) + " blocks");
}

template <typename T>
Status check_each(const char* name, const std::vector<T>& values, T minimum, int64_t blocks) {
  if (Status status = check_length(name, values.size(), blocks); !status.ok()) return status;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= minimum) continue;
    return wrong(std::string(name) + "[" + std::to_string(i) + "] is " + std::to_string(values[i]) +
                 ", below " + std::to_string(minimum));
  }
  return Status::Ok();
}

Status check_sums(const Batch& batch) {
  if (batch.block_bytes <= 0) {
    return wrong("block_bytes is " + std::to_string(batch.block_bytes) + ", not positive");
  }
  if (batch.keys.size() % kKeyBytes != 0) return wrong("keys are not 16 bytes each");
  Status status = check_length("keys", batch.keys.size() / kKeyBytes, batch.blocks());
  if (!status.ok() || batch.kind == JobKind::kCopyIn) return status;
  return check_length("checksums", batch.checksums.size(), batch.blocks());
}

Status check_planes(const Batch& batch) {
  if (!batch.has_planes()) {
    const bool is_optional = batch.kind == JobKind::kRead || batch.kind == JobKind::kFetch;
    if (is_optional && batch.ids.empty() && !batch.is_on_device) return Status::Ok();
    return wrong("planes are missing");
  }
  if (batch.planes.block_bytes() != batch.block_bytes) {
    return wrong("planes hold " + std::to_string(batch.planes.block_bytes()) +
                 " bytes a block, but block_bytes is " + std::to_string(batch.block_bytes));
  }
  return check_each<int64_t>("ids", batch.ids, 0, batch.blocks());
}

Status check_device(const Batch& batch) {
  if (batch.is_on_device && !batch.is_inbound() && !batch.is_outbound()) {
    return wrong("planes on the device are for copy_in, copy_out and read");
  }
  const auto planes = static_cast<int>(batch.planes.planes().size());
  if (batch.layer_planes < 0 || (batch.is_layered() && planes % batch.layer_planes != 0)) {
    return wrong(std::to_string(planes) + " planes do not make layers of " +
                 std::to_string(batch.layer_planes));
  }
  const bool has_addresses = batch.is_inside_device() || batch.kind == JobKind::kFetch;
  return check_each<int64_t>("device_addresses", batch.device_addresses, 1,
                             has_addresses ? batch.blocks() : 0);
}

Status check_files(const Batch& batch) {
  Status status = check_each<int32_t>("fds", batch.fds, 0, batch.blocks());
  if (!status.ok()) return status;
  return check_each<int64_t>("offsets", batch.offsets, 0, batch.blocks());
}

Status check_write(const Batch& batch) {
  Status status = check_each<int64_t>("bytes", batch.bytes, 1, batch.blocks());
  if (!status.ok()) return status;
  const auto syncs = static_cast<int64_t>(batch.sync_fds.size());
  if (syncs > kBlocksMax) return wrong("sync_fds has too many entries");
  return check_each<int32_t>("sync_fds", batch.sync_fds, 0, syncs);
}

}  // namespace

std::string_view job_kind_name(JobKind kind) {
  constexpr std::string_view kNames[kJobKinds] = {"copy_in", "copy_out", "verify",    "read",
                                                  "write",   "fetch",    "device_in", "device_out"};
  return kNames[static_cast<int>(kind)];
}

Status validate(const Batch& batch) {
  if (batch.blocks() > kBlocksMax) return wrong("addresses has more than 2**30 entries");
  const int64_t slots = batch.is_inside_device() ? 0 : batch.blocks();
  Status status = check_each<int64_t>("addresses", batch.addresses, 1, slots);
  if (status.ok()) status = check_device(batch);
  if (status.ok() && batch.is_io()) status = check_files(batch);
  if (!status.ok()) return status;
  if (batch.kind == JobKind::kWrite) return check_write(batch);
  if (batch.is_inside_device()) return check_planes(batch);
  status = check_sums(batch);
  if (status.ok() && batch.kind != JobKind::kVerify) status = check_planes(batch);
  if (status.ok() && batch.kind == JobKind::kRead && batch.io_bytes < batch.block_bytes) {
    status = wrong("io_bytes is " + std::to_string(batch.io_bytes) + ", below block_bytes " +
                   std::to_string(batch.block_bytes));
  }
  return status;
}

Status validate(std::span<const Plane> planes) {
  if (planes.empty()) return wrong("planes has no rows");
  for (size_t i = 0; i < planes.size(); ++i) {
    const Plane& plane = planes[i];
    const std::string row = "planes[" + std::to_string(i) + "]";
    if (reinterpret_cast<intptr_t>(plane.base) <= 0) return wrong(row + " has a base of zero");
    if (plane.bytes <= 0) return wrong(row + " has bytes that are not positive");
    if (plane.stride < plane.bytes) return wrong(row + " has a stride below its bytes");
  }
  return Status::Ok();
}

}  // namespace kvx
