#include "kvx/batch.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "copy_plan.h"
#include "device.h"
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

PlaneSet plane_set(const Planes& rows, bool merges = true) {
  std::vector<Plane> planes;
  for (size_t i = 0; i < rows.shape(0); ++i) {
    const int64_t* row = rows.data() + i * 3;
    planes.push_back({reinterpret_cast<uint8_t*>(row[0]), row[1], row[2]});
  }
  raise_if_error(validate(planes));
  return PlaneSet(planes, merges);
}

using Mark = const PyStreamMark*;
std::shared_ptr<StreamMark> native_of(Mark mark) {
  return mark != nullptr ? mark->native : nullptr;
}

using Progress = std::shared_ptr<LayerProgress>;

JobPointer submit(PyEngine& self, Batch batch, double deadline_s) {
  JobPointer job;
  raise_if_error(
      without_gil([&] { return self.engine->submit(std::move(batch), deadline_s, &job); }));
  return job;
}

JobPointer copy_in(PyEngine& self, const Planes& planes, const Column<int64_t>& ids,
                   const Column<int64_t>& addresses, const Keys& keys, double deadline_s,
                   bool is_on_device, Mark after) {
  Batch batch{.kind = JobKind::kCopyIn,
              .planes = plane_set(planes),
              .ids = copied(ids),
              .addresses = copied(addresses),
              .keys = copied(keys),
              .is_on_device = is_on_device,
              .after = native_of(after)};
  batch.block_bytes = batch.planes.block_bytes();
  return submit(self, std::move(batch), deadline_s);
}

JobPointer copy_out(PyEngine& self, const Column<int64_t>& addresses, const Keys& keys,
                    const Column<uint64_t>& checksums, const Planes& planes,
                    const Column<int64_t>& ids, double deadline_s, bool is_on_device, Mark after,
                    Progress progress, int layer_planes) {
  Batch batch{.kind = JobKind::kCopyOut,
              .planes = plane_set(planes, layer_planes == 0),
              .ids = copied(ids),
              .addresses = copied(addresses),
              .keys = copied(keys),
              .checksums = copied(checksums),
              .is_on_device = is_on_device,
              .after = native_of(after),
              .progress = std::move(progress),
              .layer_planes = layer_planes};
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

using OptionalPlanes = std::optional<Planes>;
using OptionalIds = std::optional<Column<int64_t>>;

void add_targets(const OptionalPlanes& planes, const OptionalIds& ids, Batch* batch) {
  if (planes.has_value() != ids.has_value()) {
    raise_if_error({Code::kUsage, "planes and ids come together or not at all"});
  }
  if (!planes.has_value()) return;
  batch->planes = plane_set(*planes, batch->layer_planes == 0);
  batch->ids = copied(*ids);
}

JobPointer read(PyEngine& self, const Column<int32_t>& fds, const Column<int64_t>& offsets,
                const Column<int64_t>& addresses, int64_t block_bytes, int64_t io_bytes,
                const Keys& keys, const Column<uint64_t>& checksums, const OptionalPlanes& planes,
                const OptionalIds& ids, double deadline_s, bool is_on_device, Mark after,
                Progress progress, int layer_planes) {
  Batch batch{.kind = JobKind::kRead,
              .block_bytes = block_bytes,
              .io_bytes = io_bytes,
              .addresses = copied(addresses),
              .keys = copied(keys),
              .checksums = copied(checksums),
              .fds = copied(fds),
              .offsets = copied(offsets),
              .is_on_device = is_on_device,
              .after = native_of(after),
              .progress = std::move(progress),
              .layer_planes = layer_planes};
  add_targets(planes, ids, &batch);
  return submit(self, std::move(batch), deadline_s);
}

JobPointer fetch(PyEngine& self, const Column<int64_t>& device_addresses,
                 const Column<int64_t>& addresses, int64_t block_bytes, const Keys& keys,
                 const Column<uint64_t>& checksums, const OptionalPlanes& planes,
                 const OptionalIds& ids, double deadline_s) {
  Batch batch{.kind = JobKind::kFetch,
              .block_bytes = block_bytes,
              .addresses = copied(addresses),
              .keys = copied(keys),
              .checksums = copied(checksums),
              .device_addresses = copied(device_addresses)};
  add_targets(planes, ids, &batch);
  return submit(self, std::move(batch), deadline_s);
}

JobPointer copy_on_device(PyEngine& self, JobKind kind, const Planes& planes,
                          const Column<int64_t>& ids, const Column<int64_t>& device_addresses,
                          double deadline_s, Mark after, Progress progress) {
  Batch batch{.kind = kind,
              .planes = plane_set(planes),
              .ids = copied(ids),
              .device_addresses = copied(device_addresses),
              .after = native_of(after),
              .progress = std::move(progress)};
  batch.block_bytes = batch.planes.block_bytes();
  return submit(self, std::move(batch), deadline_s);
}

JobPointer device_in(PyEngine& self, const Planes& planes, const Column<int64_t>& ids,
                     const Column<int64_t>& device_addresses, double deadline_s, Mark after) {
  return copy_on_device(self, JobKind::kDeviceIn, planes, ids, device_addresses, deadline_s, after,
                        nullptr);
}

JobPointer device_out(PyEngine& self, const Column<int64_t>& device_addresses, const Planes& planes,
                      const Column<int64_t>& ids, double deadline_s, Mark after,
                      Progress progress) {
  return copy_on_device(self, JobKind::kDeviceOut, planes, ids, device_addresses, deadline_s, after,
                        std::move(progress));
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
           "is_on_device"_a = false, "after"_a.none() = nb::none(),
           "Gather blocks `ids` (n,) int64 of planes (p, 3) int64 {base, stride, bytes} into host "
           "slots at `addresses` (n,) int64; checksums are computed under `keys` (n, 16) uint8. "
           "The memory must stay until the job is quiesced. With `is_on_device` the planes are "
           "memory of the attached device, whose copies begin after the mark. Raises UsageError.")
      .def("copy_out", &copy_out, "addresses"_a.noconvert(), "keys"_a.noconvert(),
           "checksums"_a.noconvert(), "planes"_a.noconvert(), "ids"_a.noconvert(), "deadline_s"_a,
           "is_on_device"_a = false, "after"_a.none() = nb::none(),
           "progress"_a.none() = nb::none(), "layer_planes"_a = 0,
           "Scatter host slots to planes. A block that does not match `checksums` (n,) uint64 is "
           "corrupt and its target filled with 0xFF; on the device it keeps what it held. With "
           "`layer_planes` the device gets that many planes of all blocks at a time, and "
           "`progress` is told. Raises UsageError.")
      .def("verify", &verify, "addresses"_a.noconvert(), "block_bytes"_a, "keys"_a.noconvert(),
           "checksums"_a.noconvert(), "deadline_s"_a,
           "Check host slots against `checksums` (n,) uint64. Raises UsageError.")
      .def(
          "read", &read, "fds"_a.noconvert(), "offsets"_a.noconvert(), "addresses"_a.noconvert(),
          "block_bytes"_a, "io_bytes"_a, "keys"_a.noconvert(), "checksums"_a.noconvert(),
          "planes"_a.none().noconvert(), "ids"_a.none().noconvert(), "deadline_s"_a,
          "is_on_device"_a = false, "after"_a.none() = nb::none(), "progress"_a.none() = nb::none(),
          "layer_planes"_a = 0,
          "Read `io_bytes` (>= block_bytes; a multiple of 4096 for direct files) at each (fd "
          "int32, "
          "offset int64) into the slot at its address, verify, and with planes scatter in the same "
          "pass, each block as soon as it arrived. Raises UsageError.")
      .def("write", &write, "fds"_a.noconvert(), "offsets"_a.noconvert(), "addresses"_a.noconvert(),
           "bytes"_a.noconvert(), "sync_fds"_a.noconvert(), "deadline_s"_a,
           "Write `bytes` (n,) int64 of each address to (fd, offset); after all of them, fdatasync "
           "each of `sync_fds` (m,) int32. A block of a synced file is ok once the sync is. Raises "
           "UsageError.");
  bind_device_submission(engine);
}

void bind_device_submission(nb::class_<PyEngine>& engine) {
  engine
      .def(
          "attach_device",
          [](PyEngine& self, const PyDevice& device, const std::string& sm, int ctas,
             int64_t staging_bytes, const std::optional<Rates>& calibration,
             const std::optional<PlainRates>& plain) {
            (void)device.open();
            const CopyOptions options = copy_options(sm, ctas, staging_bytes, calibration, plain);
            raise_if_error(
                without_gil([&] { return self.engine->attach_device(device.native, options); }));
          },
          "device"_a, nb::kw_only(), "sm"_a = "auto", "ctas"_a = 4, "staging_bytes"_a = 0,
          "calibration"_a.none() = nb::none(), "plain"_a.none() = nb::none(),
          "Give the engine the device that jobs with device memory run on; once, before the first "
          "of them. Options as for `Copies`. Raises UsageError, CapacityError, UnavailableError.")
      .def(
          "copy_stats",
          [](PyEngine& self) {
            return stats_dict(without_gil([&] { return self.engine->copy_stats(); }));
          },
          nb::sig("def copy_stats(self) -> dict[str, int]"),
          "What the device has copied, as `Copies.stats`; zeros without one.")
      .def("fetch", &fetch, "device_addresses"_a.noconvert(), "addresses"_a.noconvert(),
           "block_bytes"_a, "keys"_a.noconvert(), "checksums"_a.noconvert(),
           "planes"_a.none().noconvert(), "ids"_a.none().noconvert(), "deadline_s"_a,
           "Copy device slots at `device_addresses` (n,) int64 into host slots, verify, and with "
           "planes scatter to host memory in the same pass. Raises UsageError.")
      .def("device_in", &device_in, "planes"_a.noconvert(), "ids"_a.noconvert(),
           "device_addresses"_a.noconvert(), "deadline_s"_a, "after"_a.none() = nb::none(),
           "Gather blocks of device planes into device slots. Nothing is checksummed. Raises "
           "UsageError.")
      .def("device_out", &device_out, "device_addresses"_a.noconvert(), "planes"_a.noconvert(),
           "ids"_a.noconvert(), "deadline_s"_a, "after"_a.none() = nb::none(),
           "progress"_a.none() = nb::none(),
           "Scatter device slots to device planes. Raises UsageError.");
}

}  // namespace kvx::bind
