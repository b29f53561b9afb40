// cuStream* but for the values that streams wait for and write.
#include "entry_points.h"
#include "simulation.h"

namespace kvx::sim {

extern "C" {

Result cuStreamCreateWithPriority(Stream* stream, unsigned flags, int /*priority*/) {
  KVX_SIM_ENTER(call)
  if (stream == nullptr || (flags & ~kStreamNonBlocking) != 0) return kErrorInvalidValue;
  const auto created = call->streams.create(*call.operator->(), call.device());
  if (created == nullptr) return kErrorOutOfMemory;
  *stream = handle_of<Stream>(stream_number(created->id));
  return kSuccess;
}

Result cuStreamDestroy(Stream stream) {
  KVX_SIM_ENTER(call)
  if (call->streams.find(call, stream) == nullptr) return kErrorInvalidHandle;
  if (number_of(stream) < stream_number(0)) return kErrorInvalidHandle;
  call->streams.destroy(*call.operator->(), stream, call.lock());
  return kSuccess;
}

Result cuStreamSynchronize(Stream stream) {
  KVX_SIM_ENTER(call)
  const auto found = call->streams.find(call, stream);
  if (found == nullptr) return kErrorInvalidHandle;
  const uint64_t enqueued = found->enqueued;
  Device& device = *found->device;
  call->changed.wait(call.lock(),
                     [&] { return found->completed >= enqueued || device.sticky != kSuccess; });
  if (device.sticky != kSuccess) return device.sticky;
  call->races.host.join(found->completed_clock);
  return kSuccess;
}

Result cuStreamQuery(Stream stream) {
  KVX_SIM_ENTER(call)
  const auto found = call->streams.find(call, stream);
  if (found == nullptr) return kErrorInvalidHandle;
  if (found->completed < found->enqueued) return kErrorNotReady;
  call->races.host.join(found->completed_clock);
  return kSuccess;
}

}  // extern "C"

KVX_SIM_ALIAS(cuStreamDestroy_v2, cuStreamDestroy)

}  // namespace kvx::sim
