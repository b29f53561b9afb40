#include "kernels/kernel_set.h"

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "kernels/images.h"
#include "kernels/nvrtc.h"

namespace kvx {

namespace {

// The kernels count in 32 bits within a dimension, and add one stride's digits to another's.
constexpr uint32_t kSizeMax = (uint32_t{1} << 31) - 1;

bool is_size(uint32_t size) { return size <= kSizeMax; }

Status refused(const std::string& why) { return {Code::kUsage, "kernel parameters: " + why}; }

Status checked(const kernel::PermuteParameters& p) {
  const bool is_valid = std::all_of(std::begin(p.sizes), std::end(p.sizes), is_size);
  return is_valid && is_size(p.run_bytes) ? Status::Ok() : refused("a size is 2^31 or more");
}

Status checked(const kernel::ReshardParameters& p) {
  if (p.part_count > kernel::kReshardParts) {
    return refused(std::to_string(p.part_count) + " parts, at most " +
                   std::to_string(kernel::kReshardParts));
  }
  if (is_size(p.blocks) && is_size(p.rows) && is_size(p.run_bytes)) return Status::Ok();
  return refused("a size is 2^31 or more");
}

Status checked(const kernel::QuantiseParameters& p) {
  if (p.wide_kind > kernel::kFloat32) {
    return refused("wide_kind is " + std::to_string(p.wide_kind));
  }
  if (is_size(p.blocks) && is_size(p.tokens) && is_size(p.heads) && is_size(p.dim)) {
    return Status::Ok();
  }
  return refused("a size is 2^31 or more");
}

}  // namespace

Status KernelSet::load(const cuda::Api& api, int compute_major, int compute_minor,
                       std::unique_ptr<KernelSet>* kernels, const std::string& nvrtc_path) {
  std::string why = "the build had no nvcc";
  if (!kernel_fatbin().empty()) {
    Status status = load_from(api, "fatbin", kernel_fatbin().data(), kernels);
    if (status.ok()) return status;
    why = "what nvcc compiled: " + status.message();
  }
  std::vector<std::string> names(Nvrtc::kNames.begin(), Nvrtc::kNames.end());
  if (!nvrtc_path.empty()) names = {nvrtc_path};
  for (const std::string& name : names) {
    std::unique_ptr<Nvrtc> nvrtc;
    std::string image;
    Status status = Nvrtc::load(name, &nvrtc);
    if (status.ok()) {
      status = nvrtc->compile(kernel_source(), compute_major, compute_minor, &image);
    }
    if (status.ok()) status = load_from(api, "nvrtc", image.c_str(), kernels);
    if (status.ok()) return status;
    why += "; " + status.message();
  }
  return {Code::kUnavailable,
          why + "; the package nvidia-cuda-nvrtc of the driver's version brings a compiler"};
}

Status KernelSet::load_from(const cuda::Api& api, std::string_view origin, const void* image,
                            std::unique_ptr<KernelSet>* kernels) {
  std::unique_ptr<KernelSet> set(new KernelSet(api, origin));
  Status status = set->load_image(image);
  if (status.ok()) *kernels = std::move(set);
  return status;
}

Status KernelSet::load_image(const void* image) {
  cuda::Result result = api_.module_load(&module_, image);
  if (result != cuda::kSuccess) {
    module_ = nullptr;
    return failed(Code::kUnavailable, "cuModuleLoadData", result);
  }
  for (size_t i = 0; i < kNames.size(); ++i) {
    result = api_.module_function(&functions_[i], module_, kNames[i]);
    if (result != cuda::kSuccess) return failed(Code::kUnavailable, kNames[i], result);
  }
  return Status::Ok();
}

// A context that is gone took its modules along, so there is nothing to do about a failure here.
KernelSet::~KernelSet() {
  if (module_ != nullptr) api_.module_unload(module_);
}

Status KernelSet::failed(Code code, const std::string& what, cuda::Result result) const {
  const char* name = nullptr;
  if (api_.error_name(result, &name) != cuda::kSuccess || name == nullptr) name = "unknown error";
  return {code, what + ": " + name + " (" + std::to_string(result) + ")", result};
}

template <typename... Parameters>
Status KernelSet::launch(Kernel kernel, cuda::Stream stream, int ctas, Parameters... parameters) {
  if (ctas < 1) return refused(std::to_string(ctas) + " CTAs");
  void* addresses[] = {&parameters...};
  const cuda::Result result =
      api_.launch_kernel(functions_[kernel], static_cast<unsigned>(ctas), 1, 1,
                         kernel::kBlockThreads, 1, 1, 0, stream, addresses, nullptr);
  if (result != cuda::kSuccess) {
    return failed(Code::kDevice, std::string("launch of ") + kNames[kernel], result);
  }
  launches_.fetch_add(1, std::memory_order_relaxed);
  return Status::Ok();
}

Status KernelSet::copy_fragments(cuda::Stream stream, uint64_t fragments_address, int64_t count,
                                 int64_t fragment_bytes_max, int ctas) {
  if (count < 0 || fragment_bytes_max < 0) return refused("a count or size is negative");
  if (count == 0) return Status::Ok();
  return launch(kCopyFragments, stream, ctas, fragments_address, static_cast<uint64_t>(count),
                static_cast<uint64_t>(fragment_bytes_max));
}

Status KernelSet::permute(cuda::Stream stream, const kernel::PermuteParameters& parameters,
                          int ctas) {
  Status status = checked(parameters);
  return status.ok() ? launch(kPermute, stream, ctas, parameters) : status;
}

Status KernelSet::reshard(cuda::Stream stream, const kernel::ReshardParameters& parameters,
                          int ctas) {
  Status status = checked(parameters);
  return status.ok() ? launch(kReshard, stream, ctas, parameters) : status;
}

Status KernelSet::quantise_fp8(cuda::Stream stream, const kernel::QuantiseParameters& parameters,
                               int ctas) {
  Status status = checked(parameters);
  for (const Kernel each : {kAmax, kScale, kQuantise}) {
    if (status.ok()) status = launch(each, stream, ctas, parameters);
  }
  return status;
}

Status KernelSet::dequantise_fp8(cuda::Stream stream, const kernel::QuantiseParameters& parameters,
                                 int ctas) {
  Status status = checked(parameters);
  return status.ok() ? launch(kDequantise, stream, ctas, parameters) : status;
}

Status KernelSet::poison(cuda::Stream stream, uint64_t target, int64_t bytes, int ctas) {
  if (bytes < 0) return refused("a size is negative");
  if (bytes == 0) return Status::Ok();
  return launch(kPoison, stream, ctas, target, static_cast<uint64_t>(bytes));
}

}  // namespace kvx
