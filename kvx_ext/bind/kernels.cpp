// The kernels by themselves, for tests and benchmarks of them: what uses them otherwise is native.
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "device.h"
#include "device/cuda_device.h"
#include "engine.h"
#include "kernels/kernel_set.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

// The device outlives the set, whose last reference is the device's own: it is given up with the
// context current.
struct PyKernels {
  std::shared_ptr<CudaDevice> device;
  std::shared_ptr<KernelSet> set;

  PyKernels() = default;
  PyKernels(PyKernels&&) = default;
  PyKernels& operator=(PyKernels&&) = default;
  ~PyKernels() {
    if (device == nullptr) return;
    nb::gil_scoped_release release;
    set.reset();
    device.reset();
  }
};

PyKernels load_kernels(const PyDevice& device) {
  PyKernels made;
  (void)device.open();
  made.device = std::dynamic_pointer_cast<CudaDevice>(device.native);
  if (made.device == nullptr) raise_if_error({Code::kUnavailable, "the emulation has no kernels"});
  raise_if_error(without_gil([&] { return made.device->kernels(&made.set); }));
  return made;
}

// Runs `call` (Status(KernelSet&, cuda::Stream)) with the device's context current.
template <typename Call>
void launch(const PyKernels& self, uint64_t stream, Call call) {
  raise_if_error(check_stream(stream));
  raise_if_error(without_gil([&]() -> Status {
    const ContextScope scope(self.device->context());
    if (scope.result() != cuda::kSuccess) {
      return self.device->context().check("cuCtxPushCurrent", scope.result());
    }
    return call(*self.set, reinterpret_cast<cuda::Stream>(stream));
  }));
}

// Device code has 64-bit types of its own, so that the elements may differ in name.
template <typename Given, typename Element, size_t kSize>
void fill_in(const char* name, const std::vector<Given>& given, Element (&target)[kSize]) {
  static_assert(sizeof(Given) == sizeof(Element));
  if (given.size() > kSize) {
    raise_if_error({Code::kUsage,
                    std::string(name) + " has more than " + std::to_string(kSize) + " elements"});
  }
  std::copy(given.begin(), given.end(), target);
}

kernel::FloatKind kind_named(const std::string& name) {
  constexpr std::array<std::string_view, 3> kNames = {"float16", "bfloat16", "float32"};
  const auto* found = std::ranges::find(kNames, name);
  if (found == kNames.end()) {
    raise_if_error(
        {Code::kUsage, "kind is \"float16\", \"bfloat16\" or \"float32\", not \"" + name + "\""});
  }
  return static_cast<kernel::FloatKind>(found - kNames.begin());
}

void permute(const PyKernels& self, uint64_t stream, uint64_t target, uint64_t source,
             const std::vector<uint32_t>& sizes, const std::vector<int64_t>& target_strides,
             const std::vector<int64_t>& source_strides, uint32_t run_bytes, uint64_t target_ids,
             uint64_t source_ids, int ctas) {
  kernel::PermuteParameters parameters;
  parameters.target = target;
  parameters.source = source;
  parameters.target_ids = target_ids;
  parameters.source_ids = source_ids;
  parameters.run_bytes = run_bytes;
  fill_in("sizes", sizes, parameters.sizes);
  fill_in("target_strides", target_strides, parameters.target_strides);
  fill_in("source_strides", source_strides, parameters.source_strides);
  launch(self, stream,
         [&](KernelSet& set, cuda::Stream on) { return set.permute(on, parameters, ctas); });
}

void reshard(const PyKernels& self, uint64_t stream, uint64_t whole,
             const std::vector<uint64_t>& parts, int64_t whole_block_stride,
             int64_t part_block_stride, uint32_t blocks, uint32_t rows, uint32_t run_bytes,
             bool is_merge, int ctas) {
  kernel::ReshardParameters parameters;
  parameters.whole = whole;
  fill_in("parts", parts, parameters.parts);
  parameters.whole_block_stride = whole_block_stride;
  parameters.part_block_stride = part_block_stride;
  parameters.blocks = blocks;
  parameters.rows = rows;
  parameters.part_count = static_cast<uint32_t>(parts.size());
  parameters.run_bytes = run_bytes;
  parameters.is_merge = is_merge ? 1 : 0;
  launch(self, stream,
         [&](KernelSet& set, cuda::Stream on) { return set.reshard(on, parameters, ctas); });
}

// (blocks, tokens, heads, dim) and what goes with them, as both FP8 kernels take it.
kernel::QuantiseParameters quantising(uint64_t wide, uint64_t narrow, uint64_t scales,
                                      const std::vector<uint32_t>& shape,
                                      const std::vector<int64_t>& wide_strides,
                                      const std::vector<int64_t>& narrow_strides,
                                      const std::string& kind) {
  if (shape.size() != 4) raise_if_error({Code::kUsage, "shape is blocks, tokens, heads, dim"});
  kernel::QuantiseParameters parameters;
  parameters.wide = wide;
  parameters.narrow = narrow;
  parameters.scales = scales;
  fill_in("wide_strides", wide_strides, parameters.wide_strides);
  fill_in("narrow_strides", narrow_strides, parameters.narrow_strides);
  parameters.blocks = shape[0];
  parameters.tokens = shape[1];
  parameters.heads = shape[2];
  parameters.dim = shape[3];
  parameters.wide_kind = kind_named(kind);
  return parameters;
}

void quantise(const PyKernels& self, uint64_t stream, uint64_t wide, uint64_t narrow,
              uint64_t scales, uint64_t partials, const std::vector<uint32_t>& shape,
              const std::vector<int64_t>& wide_strides, const std::vector<int64_t>& narrow_strides,
              const std::string& kind, int ctas) {
  kernel::QuantiseParameters parameters =
      quantising(wide, narrow, scales, shape, wide_strides, narrow_strides, kind);
  parameters.partials = partials;
  launch(self, stream,
         [&](KernelSet& set, cuda::Stream on) { return set.quantise_fp8(on, parameters, ctas); });
}

void dequantise(const PyKernels& self, uint64_t stream, uint64_t wide, uint64_t narrow,
                uint64_t scales, const std::vector<uint32_t>& shape,
                const std::vector<int64_t>& wide_strides,
                const std::vector<int64_t>& narrow_strides, const std::string& kind, int ctas) {
  const kernel::QuantiseParameters parameters =
      quantising(wide, narrow, scales, shape, wide_strides, narrow_strides, kind);
  launch(self, stream,
         [&](KernelSet& set, cuda::Stream on) { return set.dequantise_fp8(on, parameters, ctas); });
}

void bind_moving(nb::class_<PyKernels>& kernels) {
  kernels
      .def(
          "copy_fragments",
          [](const PyKernels& self, uint64_t stream, uint64_t fragments_address, int64_t count,
             int64_t fragment_bytes_max, int ctas) {
            launch(self, stream, [&](KernelSet& set, cuda::Stream on) {
              return set.copy_fragments(on, fragments_address, count, fragment_bytes_max, ctas);
            });
          },
          "stream"_a, "fragments_address"_a, "count"_a, "fragment_bytes_max"_a, "ctas"_a = 4,
          "Copy `count` fragments, whose table of uint64 (target, source, bytes) lies at an "
          "address of the device or in pinned memory.")
      .def("permute", &permute, "stream"_a, "target"_a, "source"_a, nb::kw_only(), "sizes"_a,
           "target_strides"_a, "source_strides"_a, "run_bytes"_a, "target_ids"_a = 0,
           "source_ids"_a = 0, "ctas"_a = 4,
           "Copy between two arrays of up to 5 axes over runs of `run_bytes`, strides in bytes. "
           "`target_ids` and `source_ids`: addresses of int64 places along the first axis, or 0.")
      .def("reshard", &reshard, "stream"_a, "whole"_a, "parts"_a, nb::kw_only(),
           "whole_block_stride"_a, "part_block_stride"_a, "blocks"_a, "rows"_a, "run_bytes"_a,
           "is_merge"_a, "ctas"_a = 4,
           "Split blocks of (rows, parts, run) into parts of (rows, run) each, or merge them. At "
           "most 16 parts.")
      .def(
          "poison",
          [](const PyKernels& self, uint64_t stream, uint64_t target, int64_t bytes, int ctas) {
            launch(self, stream, [&](KernelSet& set, cuda::Stream on) {
              return set.poison(on, target, bytes, ctas);
            });
          },
          "stream"_a, "target"_a, "bytes"_a, "ctas"_a = 4, "Fill device memory with 0xFF.");
}

void bind_quantising(nb::class_<PyKernels>& kernels) {
  kernels
      .def("quantise_fp8", &quantise, "stream"_a, "wide"_a, "narrow"_a, "scales"_a, "partials"_a,
           nb::kw_only(), "shape"_a, "wide_strides"_a, "narrow_strides"_a, "kind"_a, "ctas"_a = 4,
           "Write e4m3fn `narrow` and (blocks, heads) float32 `scales` of `wide`; `shape` is "
           "(blocks, tokens, heads, dim), strides those of its first three axes, in bytes, `kind` "
           "\"float16\", \"bfloat16\" or \"float32\". `partials` is scratch.")
      .def("dequantise_fp8", &dequantise, "stream"_a, "wide"_a, "narrow"_a, "scales"_a,
           nb::kw_only(), "shape"_a, "wide_strides"_a, "narrow_strides"_a, "kind"_a, "ctas"_a = 4,
           "Write `wide` from `narrow` and `scales`; the rest as in `quantise_fp8`.")
      .def_static("partials_bytes", &KernelSet::partials_bytes, "blocks"_a, "heads"_a,
                  "Bytes of scratch that quantising needs.");
}

}  // namespace

void bind_kernels(nb::module_& module) {
  nb::class_<PyKernels> kernels(
      module, "Kernels",
      "kvx's kernels on one GPU. A launch is ordered on its stream, a CUstream but not the null "
      "one, and returns before it has run; memory must live until then. Thread-safe.");
  kernels
      .def(nb::new_(&load_kernels), "device"_a,
           "Load them, which may take a compiler seconds. Raises UnavailableError.")
      .def_prop_ro(
          "origin", [](const PyKernels& self) { return std::string(self.set->origin()); },
          "\"fatbin\" or \"nvrtc\".")
      .def_prop_ro(
          "launches", [](const PyKernels& self) { return self.set->launches(); },
          "Kernels launched so far on this device.");
  bind_moving(kernels);
  bind_quantising(kernels);
}

}  // namespace kvx::bind
