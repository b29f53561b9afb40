#include "kvx/batch.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>

#include <optional>

#include "engine.h"
#include "kvx/checksum.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

template <typename T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const uint8_t, nb::shape<-1, kKeyBytes>, nb::c_contig, nb::device::cpu>;
using Planes = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;
using JobPointer = std::shared_ptr<Job>;

template <typename T>
std::vector<T> copied(const Column<T>& column) {
  return std::vector<T>(column.data(), column.data() + column.shape(0));
}

std::vector<uint8_t> copied(const Keys& keys) {
  return std::vector<uint8_t>(keys.data(), keys.data() + keys.shape(0) * kKeyBytes);
}

PlaneSet plane_set(const Planes& rows) {
  std::vector<Plane> planes;
  for (size_t i = 0; i < rows.shape(0); ++i) {
    const int64_t* row = rows.data() + i * 3;
    planes.push_back({reinterpret_cast<uint8_t*>(row[0]), row[1], row[2]});
  }
  raise_if_error(validate(planes));
  return PlaneSet(planes);
}

JobPointer submit(PyEngine& self, Batch batch, double deadline_s) {
  JobPointer job;
  raise_if_error(
      without_gil([&] { return self.engine->submit(std::move(batch), deadline_s, &job); }));
  return job;
}

JobPointer copy_in(PyEngine& self, const Planes& planes, const Column<int64_t>& ids,
                   const Column<int64_t>& addresses, const Keys& keys, double deadline_s) {
  Batch batch{.kind = JobKind::kCopyIn,
              .planes = plane_set(planes),
              .ids = copied(ids),
              .addresses = copied(addresses),
              .keys = copied(keys)};
  batch.block_bytes = batch.planes.block_bytes();
  return submit(self, std::move(batch), deadline_s);
}

JobPointer copy_out(PyEngine& self, const Column<int64_t>& addresses, const Keys& keys,
                    const Column<uint64_t>& checksums, const Planes& planes,
                    const Column<int64_t>& ids, double deadline_s) {
  Batch batch{.kind = JobKind::kCopyOut,
              .planes = plane_set(planes),
              .ids = copied(ids),
              .addresses = copied(addresses),
              .keys = copied(keys),
              .checksums = copied(checksums)};
  batch.block_bytes = batch.planes.block_bytes();
  return submit(self, std::move(batch), deadline_s);
}

JobPointer verify(PyEngine& self, const Column<int64_t>& addresses, int64_t block_bytes,
                  const Keys& keys, const Column<uint64_t>& checksums, double deadline_s) {
  Batch batch{.kind = JobKind::kVerify,
              .block_bytes = block_bytes,
              .addresses = copied(addresses),
              .keys = copied(keys),
              .checksums = copied(checksums)};
  return submit(self, std::move(batch), deadline_s);
}

JobPointer read(PyEngine& self, const Column<int32_t>& fds, const Column<int64_t>& offsets,
                const Column<int64_t>& addresses, int64_t block_bytes, int64_t io_bytes,
                const Keys& keys, const Column<uint64_t>& checksums,
                const std::optional<Planes>& planes, const std::optional<Column<int64_t>>& ids,
                double deadline_s) {
  if (planes.has_value() != ids.has_value()) {
    raise_if_error({Code::kUsage, "planes and ids come together or not at all"});
  }
  Batch batch{.kind = JobKind::kRead,
              .block_bytes = block_bytes,
              .io_bytes = io_bytes,
              .addresses = copied(addresses),
              .keys = copied(keys),
              .checksums = copied(checksums),
              .fds = copied(fds),
              .offsets = copied(offsets)};
  if (planes.has_value()) {
    batch.planes = plane_set(*planes);
    batch.ids = copied(*ids);
  }
  return submit(self, std::move(batch), deadline_s);
}

JobPointer write(PyEngine& self, const Column<int32_t>& fds, const Column<int64_t>& offsets,
                 const Column<int64_t>& addresses, const Column<int64_t>& bytes,
                 const Column<int32_t>& sync_fds, double deadline_s) {
  Batch batch{.kind = JobKind::kWrite,
              .addresses = copied(addresses),
              .fds = copied(fds),
              .offsets = copied(offsets),
              .bytes = copied(bytes),
              .sync_fds = copied(sync_fds)};
  return submit(self, std::move(batch), deadline_s);
}

}  // namespace

void bind_submission(nb::class_<PyEngine>& engine) {
  engine
      .def("copy_in", &copy_in, "planes"_a.noconvert(), "ids"_a.noconvert(),
           "addresses"_a.noconvert(), "keys"_a.noconvert(), "deadline_s"_a,
           "Gather blocks `ids` (n,) int64 of planes (p, 3) int64 {base, stride, bytes} into host "
           "slots at `addresses` (n,) int64; checksums are computed under `keys` (n, 16) uint8. "
           "The memory must stay until the job is quiesced. Raises UsageError.")
      .def("copy_out", &copy_out, "addresses"_a.noconvert(), "keys"_a.noconvert(),
           "checksums"_a.noconvert(), "planes"_a.noconvert(), "ids"_a.noconvert(), "deadline_s"_a,
           "Scatter host slots to planes. A block that does not match `checksums` (n,) uint64 is "
           "corrupt and its target filled with 0xFF. Raises UsageError.")
      .def("verify", &verify, "addresses"_a.noconvert(), "block_bytes"_a, "keys"_a.noconvert(),
           "checksums"_a.noconvert(), "deadline_s"_a,
           "Check host slots against `checksums` (n,) uint64. Raises UsageError.")
      .def(
          "read", &read, "fds"_a.noconvert(), "offsets"_a.noconvert(), "addresses"_a.noconvert(),
          "block_bytes"_a, "io_bytes"_a, "keys"_a.noconvert(), "checksums"_a.noconvert(),
          "planes"_a.none().noconvert(), "ids"_a.none().noconvert(), "deadline_s"_a,
          "Read `io_bytes` (>= block_bytes; a multiple of 4096 for direct files) at each (fd "
          "int32, "
          "offset int64) into the slot at its address, verify, and with planes scatter in the same "
          "pass, each block as soon as it arrived. Raises UsageError.")
      .def("write", &write, "fds"_a.noconvert(), "offsets"_a.noconvert(), "addresses"_a.noconvert(),
           "bytes"_a.noconvert(), "sync_fds"_a.noconvert(), "deadline_s"_a,
           "Write `bytes` (n,) int64 of each address to (fd, offset); after all of them, fdatasync "
           "each of `sync_fds` (m,) int32. A block of a synced file is ok once the sync is. Raises "
           "UsageError.");
}

}  // namespace kvx::bind
