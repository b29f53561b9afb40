// kvx's kernels, loaded into one device's context and ready to be launched.
//
// A launch is ordered on the stream it is given and returns before the kernel has run; whoever
// launches keeps the memory alive until then. Thread-safe: a launch changes nothing but a counter.
// Every function below REQUIRES that the context which was current in `load` is current.
//
// The arithmetic is that of kvx/transfer/relayout.py, bit for bit, whatever the number of CTAs.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "kernels/parameters.h"
#include "kvx/status.h"
#include "shim/cuda/abi.h"

namespace kvx {

class KernelSet {
 public:
  // Loads what the build compiled; where it has nothing for this GPU, what NVRTC compiles from the
  // embedded source, which takes seconds. `nvrtc_path` names the library where it is not among the
  // system's. kUnavailable, saying what was tried, where neither works: copy engines do without.
  // REQUIRES that `api` outlives the set.
  static Status load(const cuda::Api& api, int compute_major, int compute_minor,
                     std::unique_ptr<KernelSet>* kernels, const std::string& nvrtc_path = {});
  ~KernelSet();

  KernelSet(const KernelSet&) = delete;
  KernelSet& operator=(const KernelSet&) = delete;

  // Copies `count` kernel::Fragment that lie at a device address, best in device memory: pinned
  // host memory is read over the link. `fragment_bytes_max` says how far to split the work; no
  // fragment should be longer, one that is takes longer. No fragment may overlap another's target.
  Status copy_fragments(cuda::Stream stream, uint64_t fragments_address, int64_t count,
                        int64_t fragment_bytes_max, int ctas);

  // Copies between two layouts; see kernel::PermuteParameters. Targets must not overlap sources.
  Status permute(cuda::Stream stream, const kernel::PermuteParameters& parameters, int ctas);

  // Splits the heads of blocks among ranks, or merges them; see kernel::ReshardParameters.
  Status reshard(cuda::Stream stream, const kernel::ReshardParameters& parameters, int ctas);

  // Writes `narrow` and `scales` from `wide`, by three launches; see kernel::QuantiseParameters.
  Status quantise_fp8(cuda::Stream stream, const kernel::QuantiseParameters& parameters, int ctas);

  // Writes `wide` from `narrow` and `scales`; `partials` is not used.
  Status dequantise_fp8(cuda::Stream stream, const kernel::QuantiseParameters& parameters,
                        int ctas);

  // Fills memory with 0xFF.
  Status poison(cuda::Stream stream, uint64_t target, int64_t bytes, int ctas);

  // "fatbin" or "nvrtc".
  std::string_view origin() const { return origin_; }

  // Kernels launched so far.
  int64_t launches() const { return launches_.load(std::memory_order_relaxed); }

  // Bytes of `partials` that quantising needs.
  static int64_t partials_bytes(int64_t blocks, int64_t heads) {
    return blocks * heads * int64_t{kernel::kAmaxSlices} * 4;
  }

 private:
  enum Kernel {
    kCopyFragments,
    kPermute,
    kReshard,
    kAmax,
    kScale,
    kQuantise,
    kDequantise,
    kPoison
  };
  static constexpr std::array kNames = {"kvx_copy_fragments", "kvx_permute", "kvx_reshard",
                                        "kvx_amax",           "kvx_scale",   "kvx_quantise_fp8",
                                        "kvx_dequantise_fp8", "kvx_poison"};

  KernelSet(const cuda::Api& api, std::string_view origin) : api_(api), origin_(origin) {}
  static Status load_from(const cuda::Api& api, std::string_view origin, const void* image,
                          std::unique_ptr<KernelSet>* kernels);
  Status load_image(const void* image);
  template <typename... Parameters>
  Status launch(Kernel kernel, cuda::Stream stream, int ctas, Parameters... parameters);
  Status failed(Code code, const std::string& what, cuda::Result result) const;

  const cuda::Api& api_;
  const std::string_view origin_;
  cuda::Module module_ = nullptr;
  std::array<cuda::Function, kNames.size()> functions_ = {};
  std::atomic<int64_t> launches_{0};
};

}  // namespace kvx
