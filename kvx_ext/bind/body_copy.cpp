#include "kvx/body_copy.h"

#include <nanobind/ndarray.h>

#include "arrays.h"
#include "bind.h"
#include "kvx/checksum.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

using Body = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableBody = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const uint8_t, nb::shape<-1, kKeyBytes>, nb::c_contig, nb::device::cpu>;

// Binds `copy` between blocks and a body, which is const where it is only read.
template <auto copy, typename Body>
NumpyRow<uint64_t> copied(const Body& body, const Row<int64_t>& offsets,
                          const Row<int64_t>& addresses, const Keys& keys, int64_t block_bytes) {
  NewRow<uint64_t> sums(offsets.shape(0));
  Status status;
  {
    nb::gil_scoped_release release;
    status = copy({view(offsets), view(addresses), {keys.data(), keys.size()}, block_bytes},
                  {body.data(), body.size()}, sums.span());
  }
  raise_if_error(status);
  return sums.numpy();
}

}  // namespace

void bind_body_copy(nb::module_& module) {
  module.def("gather_into_body", &copied<gather_into_body, MutableBody>, "body"_a, "offsets"_a,
             "addresses"_a, "keys"_a, "block_bytes"_a,
             "Copy `block_bytes` from each of the (n,) int64 host addresses to its (n,) int64 "
             "offset in the (k,) uint8 body; returns the (n,) uint64 checksums of what was copied "
             "under the (n, 16) uint8 keys. One thread, without the GIL. Raises UsageError for a "
             "block beyond the body; nothing was copied then.");
  module.def("scatter_from_body", &copied<scatter_from_body, Body>, "body"_a, "offsets"_a,
             "addresses"_a, "keys"_a, "block_bytes"_a,
             "The other way: from the body, which may be read-only, to the addresses. Judges no "
             "checksum.");
}

}  // namespace kvx::bind
