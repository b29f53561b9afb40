// cuMemcpy* and cuMemset*. An address says itself whether it is of the host or of a device.
#include <cstring>
#include <vector>

#include "copies.h"
#include "entry_points.h"
#include "simulation.h"

namespace kvx::sim {

namespace {

constexpr int kMemoryTypeArray = 3;

Result copy(Call& call, DevicePointer target, DevicePointer source, size_t bytes, Stream stream) {
  const auto on = call->streams.find(call, stream);
  if (on == nullptr) return kErrorInvalidHandle;
  if (bytes == 0) return kSuccess;
  std::vector<CopyPart> parts(1);
  const Result result = resolve(call, target, source, bytes, parts.data());
  if (result == kSuccess) enqueue_copies(call, *on, std::move(parts), false);
  return result;
}

bool is_order(int order) { return order >= kSourceOrderStream && order <= kSourceOrderAny; }

struct Batch {
  const DevicePointer* targets;
  const DevicePointer* sources;
  const size_t* bytes;
  size_t count;
  const MemcpyAttributes* attributes;
  const size_t* attribute_starts;
  size_t attribute_count;
};

bool has_valid_attributes(const Batch& batch) {
  if (batch.attribute_count == 0 || batch.attribute_count > batch.count) return false;
  if (batch.attributes == nullptr || batch.attribute_starts == nullptr) return false;
  for (size_t i = 0; i < batch.attribute_count; ++i) {
    const size_t start = batch.attribute_starts[i];
    const bool is_in_order = i == 0 ? start == 0 : start > batch.attribute_starts[i - 1];
    if (!is_in_order || start >= batch.count) return false;
    if (!is_order(batch.attributes[i].source_access_order)) return false;
  }
  return true;
}

// Nothing is queued when one of the copies is wrong; `failed_index` says which.
Result copy_batch(Call& call, const Batch& batch, Stream stream, size_t* failed_index) {
  *failed_index = SIZE_MAX;
  const auto on = call->streams.find(call, stream);
  if (on == nullptr) return kErrorInvalidHandle;
  if (batch.count == 0 || batch.targets == nullptr || batch.sources == nullptr ||
      batch.bytes == nullptr || !has_valid_attributes(batch)) {
    return kErrorInvalidValue;
  }
  ++call->counters.batch_calls;
  std::vector<CopyPart> parts(batch.count);
  size_t attribute = 0;
  for (size_t i = 0; i < batch.count; ++i) {
    const bool is_next = attribute + 1 < batch.attribute_count;
    if (is_next && batch.attribute_starts[attribute + 1] == i) ++attribute;
    parts[i].source_order = batch.attributes[attribute].source_access_order;
    const bool has_bytes = batch.bytes[i] != 0;
    const Result result =
        has_bytes ? resolve(call, batch.targets[i], batch.sources[i], batch.bytes[i], &parts[i])
                  : kErrorInvalidValue;
    if (result != kSuccess) {
      *failed_index = i;
      return result;
    }
  }
  enqueue_copies(call, *on, std::move(parts), true);
  return kSuccess;
}

// Where the rows of one end of a 2D copy begin; false for what is no linear memory.
bool first_row(int type, const void* host, DevicePointer device, uint64_t* address) {
  if (type == kMemoryTypeArray || type < kMemoryTypeHost || type > kMemoryTypeUnified) return false;
  *address = type == kMemoryTypeHost ? reinterpret_cast<uint64_t>(host) : device;
  return true;
}

}  // namespace

extern "C" {

Result cuMemcpyAsync(DevicePointer target, DevicePointer source, size_t bytes, Stream stream) {
  KVX_SIM_ENTER(call)
  return copy(call, target, source, bytes, stream);
}

Result cuMemcpyPeerAsync(DevicePointer target, Context target_context, DevicePointer source,
                         Context source_context, size_t bytes, Stream stream) {
  KVX_SIM_ENTER(call)
  Devices& devices = call->devices;
  if (devices.find(target_context) == nullptr || devices.find(source_context) == nullptr) {
    return kErrorInvalidContext;
  }
  return copy(call, target, source, bytes, stream);
}

Result cuMemcpy2DAsync(const Memcpy2D* copy, Stream stream) {
  KVX_SIM_ENTER(call)
  const auto on = call->streams.find(call, stream);
  if (on == nullptr) return kErrorInvalidHandle;
  uint64_t source = 0;
  uint64_t target = 0;
  const bool is_linear =
      copy != nullptr &&
      first_row(copy->source_type, copy->source_host, copy->source_device, &source) &&
      first_row(copy->target_type, copy->target_host, copy->target_device, &target);
  if (!is_linear) return kErrorInvalidValue;
  const bool is_row = copy->height <= 1;
  if (!is_row && (copy->source_pitch < copy->source_x_bytes + copy->width_bytes ||
                  copy->target_pitch < copy->target_x_bytes + copy->width_bytes)) {
    return kErrorInvalidValue;
  }
  if (copy->width_bytes == 0 || copy->height == 0) return kSuccess;
  source += copy->source_y * copy->source_pitch + copy->source_x_bytes;
  target += copy->target_y * copy->target_pitch + copy->target_x_bytes;
  std::vector<CopyPart> rows(copy->height);
  for (size_t i = 0; i < rows.size(); ++i) {
    const Result result = resolve(call, target + i * copy->target_pitch,
                                  source + i * copy->source_pitch, copy->width_bytes, &rows[i]);
    if (result != kSuccess) return result;
  }
  enqueue_copies(call, *on, std::move(rows), false);
  return kSuccess;
}

Result cuMemsetD8Async(DevicePointer target, unsigned char value, size_t bytes, Stream stream) {
  KVX_SIM_ENTER(call)
  const auto on = call->streams.find(call, stream);
  if (on == nullptr) return kErrorInvalidHandle;
  if (bytes == 0) return kSuccess;
  CopySide side;
  const Result result = resolve(call, target, bytes, &side);
  if (result != kSuccess) return result;
  Simulation& sim = *call.operator->();
  Operation operation;
  operation.label.symbol = call.symbol();
  operation.touched.push_back({target, bytes});
  operation.run = [&sim, side, value, bytes](auto& lock, StreamState& running,
                                             const Operation& op) {
    sim.races.add(
        {side.address, side.address + bytes, true, running.owner, op.epoch, op.label, false},
        running.clock, sim.convictions);
    EngineUse use(sim, running, Engine::kOnDevice, lock);
    if (!use.spend(bytes, true)) return;
    lock.unlock();
    std::memset(side.bytes, value, bytes);
    lock.lock();
  };
  sim.streams.enqueue(sim, *on, std::move(operation));
  return kSuccess;
}

Result cuMemcpyBatchAsync(DevicePointer* targets, DevicePointer* sources, size_t* bytes,
                          size_t count, MemcpyAttributes* attributes, size_t* attribute_starts,
                          size_t attribute_count, size_t* failed_index, Stream stream) {
  KVX_SIM_ENTER(call)
  const Batch batch{targets, sources, bytes, count, attributes, attribute_starts, attribute_count};
  size_t failed = 0;
  const Result result = copy_batch(call, batch, stream, &failed);
  if (result != kSuccess && failed_index != nullptr) *failed_index = failed;
  return result;
}

Result cuMemcpyBatchAsync_v2(DevicePointer* targets, DevicePointer* sources, size_t* bytes,
                             size_t count, MemcpyAttributes* attributes, size_t* attribute_starts,
                             size_t attribute_count, Stream stream) {
  Call call("cuMemcpyBatchAsync");  // to faults and counts the two forms are one
  if (call.is_refused()) return call.refusal();
  const Batch batch{targets, sources, bytes, count, attributes, attribute_starts, attribute_count};
  size_t failed = 0;
  return copy_batch(call, batch, stream, &failed);
}

}  // extern "C"

KVX_SIM_ALIAS(cuMemcpy2DAsync_v2, cuMemcpy2DAsync)

}  // namespace kvx::sim
