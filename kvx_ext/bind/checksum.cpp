#include "kvx/checksum.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "bind.h"
#include "kvx/row_checksums.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const uint8_t, nb::shape<-1, kKeyBytes>, nb::c_contig, nb::device::cpu>;
using Checksums = nb::ndarray<nb::numpy, uint64_t, nb::ndim<1>>;

const ChecksumKernel& kernel_named(const std::string& name) {
  for (const ChecksumKernel& kernel : checksum_kernels()) {
    if (name.empty() || kernel.name == name) return kernel;
  }
  raise_if_error({Code::kUsage, "no checksum kernel \"" + name + "\" on this CPU"});
  return fastest_checksum_kernel();
}

void check_sizes(size_t target, size_t source) {
  if (target == source) return;
  raise_if_error({Code::kUsage, "target has " + std::to_string(target) + " bytes, source " +
                                    std::to_string(source)});
}

Checksums block_checksums(
    const nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& blocks,
    const Keys& keys) {
  const size_t count = blocks.shape(0);
  const size_t bytes = blocks.shape(1);
  if (keys.shape(0) != count) {
    raise_if_error({Code::kUsage, std::to_string(count) + " blocks but " +
                                      std::to_string(keys.shape(0)) + " keys"});
  }
  auto* sums = new uint64_t[count];
  {
    nb::gil_scoped_release release;
    const ChecksumKernel& kernel = fastest_checksum_kernel();
    for (size_t i = 0; i < count; ++i) {
      sums[i] = kernel.update(block_seed(keys.data() + i * kKeyBytes, bytes),
                              blocks.data() + i * bytes, bytes);
    }
  }
  nb::capsule owner(sums, [](void* data) noexcept { delete[] static_cast<uint64_t*>(data); });
  return {sums, {count}, owner};
}

using Rows = nb::ndarray<const int64_t, nb::shape<-1, 4>, nb::c_contig, nb::device::cpu>;

NumpyRow<uint64_t> checksums_of_rows(const Bytes& memory, const Rows& rows,
                                     const std::optional<Keys>& keys) {
  const size_t count = rows.shape(0);
  NewRow<uint64_t> sums(count);
  Status status;
  {
    nb::gil_scoped_release release;
    std::vector<Descriptor> blocks(count);
    for (size_t i = 0; i < count; ++i) {
      const int64_t* row = rows.data() + i * 4;
      blocks[i] = {row[0], row[1], row[2], row[3]};
    }
    std::span<const uint8_t> all_keys;
    if (keys) all_keys = {keys->data(), keys->size()};
    status = row_checksums({memory.data(), memory.size()}, blocks, all_keys, sums.span());
  }
  raise_if_error(status);
  return sums.numpy();
}

}  // namespace

void bind_checksum(nb::module_& module) {
  module.def(
      "checksum_kernels",
      [] {
        std::vector<std::string> names;
        for (const ChecksumKernel& kernel : checksum_kernels()) names.emplace_back(kernel.name);
        return names;
      },
      "Names of the checksum kernels this CPU can run, the one in use first.");
  module.def("block_checksums", &block_checksums, "blocks"_a, "keys"_a,
             "Checksums of (n, block_bytes) uint8 blocks under (n, 16) uint8 keys as (n,) uint64. "
             "One thread, without the GIL. Source: docs/formats/nvme.md.");
  module.def("row_checksums", &checksums_of_rows, "memory"_a, "rows"_a,
             "keys"_a.none() = nb::none(),
             "Checksums of blocks where they lie in `memory`: rows is (n, 4) int64 of offset, "
             "stride, count, bytes; keys (n, 16) uint8, None for zeros. One thread, without the "
             "GIL. Source: kvx_ext/include/kvx/row_checksums.h.");
  module.def(
      "crc64",
      [](const Bytes& source, uint64_t state, const std::string& kernel) {
        const ChecksumKernel& chosen = kernel_named(kernel);
        nb::gil_scoped_release release;
        return chosen.update(state, source.data(), source.shape(0));
      },
      "source"_a, "state"_a = 0, "kernel"_a = "",
      "Continue the bare CRC-64/NVME register `state` over `source` with the kernel named.");
  module.def(
      "copy_with_crc64",
      [](const MutableBytes& target, const Bytes& source, uint64_t state, bool is_streaming,
         const std::string& kernel) {
        check_sizes(target.shape(0), source.shape(0));
        const ChecksumKernel& chosen = kernel_named(kernel);
        nb::gil_scoped_release release;
        return chosen.copy(state, target.data(), source.data(), source.shape(0),
                           is_streaming ? Stores::kStreaming : Stores::kCached);
      },
      "target"_a, "source"_a, "state"_a = 0, "is_streaming"_a = true, "kernel"_a = "",
      "Copy and checksum in one pass; returns the new register. The ranges must not overlap.");
  module.def(
      "copy_only",
      [](const MutableBytes& target, const Bytes& source, bool is_streaming,
         const std::string& kernel) {
        check_sizes(target.shape(0), source.shape(0));
        const ChecksumKernel& chosen = kernel_named(kernel);
        nb::gil_scoped_release release;
        chosen.copy_only(target.data(), source.data(), source.shape(0),
                         is_streaming ? Stores::kStreaming : Stores::kCached);
      },
      "target"_a, "source"_a, "is_streaming"_a = true, "kernel"_a = "",
      "Copy with the same stores and no checksum: the limit line of the benchmarks.");
}

}  // namespace kvx::bind
