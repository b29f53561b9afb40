#include "device/cuda_issue.h"

namespace kvx {

cuda::Result CudaIssuer::issue_batch(const CopyCall& call, int source_order, CopyRuns* runs) {
  cuda::MemcpyAttributes attributes;
  attributes.source_access_order = source_order;
  attributes.flags = cuda::kMemcpyPreferOverlapWithCompute;
  size_t attribute_start = 0;  // these attributes hold from the first run on
  size_t failed = 0;
  static_assert(sizeof(uint64_t) == sizeof(cuda::DevicePointer));
  return context_.api().memcpy_batch_async(
      reinterpret_cast<cuda::DevicePointer*>(runs->targets.data() + call.first),
      reinterpret_cast<cuda::DevicePointer*>(runs->sources.data() + call.first),
      runs->bytes.data() + call.first, call.count, &attributes, &attribute_start, 1, &failed,
      stream_);
}

cuda::Result CudaIssuer::issue_rows(const CopyCall& call, const CopyRuns& runs) {
  cuda::Memcpy2D copy;
  const uint64_t source = runs.sources[call.first];
  const uint64_t target = runs.targets[call.first];
  if (direction_ == CopyDirection::kHostToDevice) {
    copy.source_type = cuda::kMemoryTypeHost;
    copy.source_host = reinterpret_cast<const void*>(source);
  } else {
    copy.source_type = cuda::kMemoryTypeDevice;
    copy.source_device = source;
  }
  if (direction_ == CopyDirection::kDeviceToHost) {
    copy.target_type = cuda::kMemoryTypeHost;
    copy.target_host = reinterpret_cast<void*>(target);
  } else {
    copy.target_type = cuda::kMemoryTypeDevice;
    copy.target_device = target;
  }
  copy.source_pitch = static_cast<size_t>(call.source_stride);
  copy.target_pitch = static_cast<size_t>(call.target_stride);
  copy.width_bytes = runs.bytes[call.first];
  copy.height = call.count;
  return context_.api().memcpy_2d_async(&copy, stream_);
}

cuda::Result CudaIssuer::issue_singles(const CopyCall& call, const CopyRuns& runs) {
  for (size_t i = call.first; i < call.first + call.count; ++i) {
    const cuda::Result result =
        context_.api().memcpy_async(runs.targets[i], runs.sources[i], runs.bytes[i], stream_);
    if (result != cuda::kSuccess) return result;
  }
  return cuda::kSuccess;
}

cuda::Result CudaIssuer::issue(const CopyCall& call, int source_order, CopyRuns* runs,
                               CopyStats* stats) {
  CopyMethod method = call.method;
  cuda::Result result = cuda::kErrorNotSupported;
  if (method == CopyMethod::kBatch && has_batch_) {
    result = issue_batch(call, source_order, runs);
    // A driver may have the entry point for devices other than this one.
    if (result == cuda::kErrorNotSupported) has_batch_ = false;
  }
  if (method == CopyMethod::kBatch && !has_batch_) method = CopyMethod::kSingle;
  if (method == CopyMethod::kRows) result = issue_rows(call, *runs);
  if (method == CopyMethod::kSingle) result = issue_singles(call, *runs);
  const auto counted = static_cast<size_t>(method);
  stats->runs_by_method[counted] += static_cast<int64_t>(call.count);
  stats->calls_by_method[counted] +=
      method == CopyMethod::kSingle ? static_cast<int64_t>(call.count) : 1;
  return context_.note(result);
}

}  // namespace kvx
