#include "device/cuda_staging.h"

#include <algorithm>
#include <utility>

namespace kvx {

Status CudaStaging::create(const std::shared_ptr<CudaDevice>& device, CopyDirection direction,
                           const CopyOptions& options, cuda::Stream lane_stream,
                           std::unique_ptr<CudaStaging>* staging) {
  const bool is_wanted = options.sm == SmUse::kAuto &&
                         direction != CopyDirection::kDeviceToDevice &&
                         options.staging_bytes >= kSlots * kSlotBytesMin;
  if (!is_wanted) return Status::Ok();
  std::unique_ptr<CudaStaging> made(new CudaStaging(device, direction, options.ctas, lane_stream));
  Status status = device->kernels(&made->kernels_);
  // Copy engines do without; DeviceInfo says why there are none.
  if (status.code() == Code::kUnavailable) return Status::Ok();
  if (status.ok()) status = made->set_up(options.staging_bytes);
  if (status.ok()) *staging = std::move(made);
  return status;
}

Status CudaStaging::set_up(int64_t bytes) {
  slot_bytes_ = static_cast<uint64_t>(bytes / kSlots / kAlignment * kAlignment);
  bytes_ = static_cast<int64_t>(slot_bytes_) * kSlots;
  const cuda::Api& api = context_.api();
  Status status = context_.call("cuMemAlloc of the staging memory", [&] {
    return api.mem_alloc(&memory_, static_cast<size_t>(bytes_));
  });
  if (!status.ok()) return status;
  status = context_.call("cuStreamCreateWithPriority", [&] {
    int least = 0;
    int greatest = 0;
    const cuda::Result result = api.context_stream_priorities(&least, &greatest);
    if (result != cuda::kSuccess) return result;
    return api.stream_create(&kernel_stream_, cuda::kStreamNonBlocking, greatest);
  });
  if (!status.ok()) return status;
  status = HostRegion::create(kTableBytes * kSlots, RegionKind::kAnonymous,
                              device_.info().numa_node, &tables_);
  if (!status.ok()) return status;
  status = context_.call("cuMemHostRegister of the fragment tables", [&] {
    return api.host_register(tables_->data(), static_cast<size_t>(tables_->bytes()),
                             cuda::kHostRegisterPortable);
  });
  if (!status.ok()) return status;
  has_registered_ = true;
  return make_slots();
}

Status CudaStaging::make_slots() {
  cuda::DevicePointer tables = 0;
  return context_.call("preparing the staging memory", [&] {
    cuda::Result result =
        context_.api().host_device_pointer(&tables, static_cast<void*>(tables_->data()), 0);
    if (result == cuda::kSuccess) result = device_.events().take(&fork_);
    for (size_t i = 0; i < kSlots && result == cuda::kSuccess; ++i) {
      Slot slot;
      slot.data = memory_ + i * slot_bytes_;
      slot.fragments = reinterpret_cast<kernel::Fragment*>(tables_->data() + i * kTableBytes);
      slot.fragments_address = tables + i * kTableBytes;
      result = device_.events().take(&slot.half);
      if (result == cuda::kSuccess) result = device_.events().take(&slot.done);
      slots_.push_back(std::move(slot));
    }
    return result;
  });
}

CudaStaging::~CudaStaging() {
  const cuda::Api& api = context_.api();
  if (kernel_stream_ != nullptr) {
    context_.release("cuStreamDestroy", [&] { return api.stream_destroy(kernel_stream_); });
  }
  if (memory_ != 0) context_.release("cuMemFree", [&] { return api.mem_free(memory_); });
  if (has_registered_) {
    context_.release("cuMemHostUnregister", [&] { return api.host_unregister(tables_->data()); });
  }
}

// `waiting` goes on when what is in `recorded` now is over.
cuda::Result CudaStaging::join(cuda::Stream waiting, cuda::Event event, cuda::Stream recorded) {
  const cuda::Result result = context_.api().event_record(event, recorded);
  if (result != cuda::kSuccess) return result;
  return context_.api().stream_wait_event(waiting, event, 0);
}

cuda::Result CudaStaging::begin() {
  return context_.note(join(kernel_stream_, fork_.get(), lane_stream_));
}

cuda::Result CudaStaging::end(cuda::Event event) {
  // On the stream that is behind anyway, so that the other goes on to the next group.
  const bool is_scatter = direction_ == CopyDirection::kHostToDevice;
  const cuda::Stream last = is_scatter ? kernel_stream_ : lane_stream_;
  const cuda::Stream first = is_scatter ? lane_stream_ : kernel_stream_;
  const cuda::Result result = context_.note(join(last, fork_.get(), first));
  if (result != cuda::kSuccess) return result;
  return context_.note(context_.api().event_record(event, last));
}

cuda::Result CudaStaging::copy(const CopyCall& call, const CopyRuns& runs, CopyStats* stats) {
  const bool is_scatter = direction_ == CopyDirection::kHostToDevice;
  const std::vector<uint64_t>& hosts = is_scatter ? runs.sources : runs.targets;
  const std::vector<uint64_t>& devices = is_scatter ? runs.targets : runs.sources;
  Slot* slot = nullptr;
  Slice slice;
  for (size_t i = call.first; i < call.first + call.count; ++i) {
    for (uint64_t done = 0; done < runs.bytes[i];) {
      if (slot == nullptr) {
        const cuda::Result result = take_slot(&slot);
        if (result != cuda::kSuccess) return result;
        slice = {.host = hosts[i] + done};
      }
      const uint64_t bytes = std::min(runs.bytes[i] - done, slot_bytes_ - slice.bytes);
      const uint64_t staged = slot->data + slice.bytes;
      const uint64_t fragment = devices[i] + done;
      slot->fragments[slice.fragments++] = is_scatter ? kernel::Fragment{fragment, staged, bytes}
                                                      : kernel::Fragment{staged, fragment, bytes};
      slice.longest = std::max(slice.longest, bytes);
      slice.bytes += bytes;
      done += bytes;
      if (slice.bytes < slot_bytes_ && slice.fragments < kFragmentsMax) continue;
      const cuda::Result result = flush(slot, slice, stats);
      if (result != cuda::kSuccess) return result;
      slot = nullptr;
    }
  }
  constexpr auto kStaged = static_cast<size_t>(CopyMethod::kStaged);
  stats->runs_by_method[kStaged] += static_cast<int64_t>(call.count);
  return slot == nullptr ? cuda::kSuccess : flush(slot, slice, stats);
}

// Waits on the CPU: the table is the CPU's to write.
cuda::Result CudaStaging::take_slot(Slot** slot) {
  const cuda::Api& api = context_.api();
  cuda::Result result = cuda::kSuccess;
  if (is_doubtful_) {
    result = api.stream_synchronize(lane_stream_);
    if (result == cuda::kSuccess) result = api.stream_synchronize(kernel_stream_);
    if (result != cuda::kSuccess) return context_.note(result);
    is_doubtful_ = false;
  }
  Slot& next = slots_[next_slot_++ % slots_.size()];
  result = api.event_query(next.done.get());
  if (result == cuda::kErrorNotReady) result = api.event_synchronize(next.done.get());
  *slot = &next;
  device_.note_host_access(next.fragments, kTableBytes, true);
  return context_.note(result);
}

cuda::Result CudaStaging::launch(Slot* slot, const Slice& slice, CopyStats* stats) {
  const Status status = kernels_->copy_fragments(kernel_stream_, slot->fragments_address,
                                                 static_cast<int64_t>(slice.fragments),
                                                 static_cast<int64_t>(slice.longest), ctas_);
  if (status.ok()) {
    ++stats->kernels_launched;
    return cuda::kSuccess;
  }
  return status.error_number() == 0 ? cuda::kErrorUnknown : status.error_number();
}

cuda::Result CudaStaging::flush(Slot* slot, const Slice& slice, CopyStats* stats) {
  const cuda::Api& api = context_.api();
  is_doubtful_ = true;  // until its last step
  cuda::Result result = cuda::kSuccess;
  cuda::Stream last = kernel_stream_;
  if (direction_ == CopyDirection::kHostToDevice) {
    result = api.memcpy_async(slot->data, slice.host, slice.bytes, lane_stream_);
    if (result == cuda::kSuccess) result = join(kernel_stream_, slot->half.get(), lane_stream_);
    if (result == cuda::kSuccess) result = launch(slot, slice, stats);
  } else {
    last = lane_stream_;
    result = launch(slot, slice, stats);
    if (result == cuda::kSuccess) result = join(lane_stream_, slot->half.get(), kernel_stream_);
    if (result == cuda::kSuccess) {
      result = api.memcpy_async(slice.host, slot->data, slice.bytes, lane_stream_);
    }
  }
  if (result == cuda::kSuccess) result = api.event_record(slot->done.get(), last);
  is_doubtful_ = result != cuda::kSuccess;
  ++stats->calls_by_method[static_cast<size_t>(CopyMethod::kStaged)];
  return context_.note(result);
}

}  // namespace kvx
