#include "kvx/engine.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "bind.h"
#include "kvx/checksum.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

template <typename T>
using Column = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Keys = nb::ndarray<const uint8_t, nb::shape<-1, kKeyBytes>, nb::c_contig, nb::device::cpu>;
using Planes = nb::ndarray<const int64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Array = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
using JobPointer = std::shared_ptr<Job>;

// The engine as Python owns it: closing late is a ResourceWarning, never a hang under the GIL.
struct PyEngine {
  std::unique_ptr<Engine> engine;

  PyEngine() = default;
  PyEngine(PyEngine&&) = default;
  PyEngine& operator=(PyEngine&&) = default;
  ~PyEngine() {
    if (engine == nullptr) return;
    if (!engine->is_closed() &&
        PyErr_WarnEx(PyExc_ResourceWarning, "kvx engine was not closed", 1) != 0) {
      PyErr_WriteUnraisable(nullptr);
    }
    nb::gil_scoped_release release;
    engine.reset();
  }
};

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

template <typename T>
Array<T> owned(std::vector<T> values) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* data) noexcept { delete static_cast<std::vector<T>*>(data); });
  return {kept->data(), {kept->size()}, owner};
}

template <typename T>
Array<T> results(const Job& job, void (Job::*fill)(std::span<T>) const) {
  std::vector<T> values(static_cast<size_t>(job.blocks()));
  {
    nb::gil_scoped_release release;
    (job.*fill)(values);
  }
  return owned(std::move(values));
}

template <typename Call>
auto without_gil(Call call) {
  nb::gil_scoped_release release;
  return call();
}

JobPointer submit(PyEngine& self, Batch batch, double deadline_s) {
  JobPointer job;
  raise_if_error(
      without_gil([&] { return self.engine->submit(std::move(batch), deadline_s, &job); }));
  return job;
}

PyEngine make_engine(int copy_threads, const std::string& backend, int queue_depth, int io_threads,
                     std::shared_ptr<Failpoints> failpoints, const std::string& journal_path) {
  EngineOptions options;
  options.copy_threads = copy_threads;
  if (backend == "uring") {
    options.backend = BackendKind::kUring;
  } else if (backend == "posix") {
    options.backend = BackendKind::kPosix;
  } else if (backend != "auto") {
    raise_if_error(
        {Code::kUsage, "backend is \"auto\", \"uring\" or \"posix\", not \"" + backend + "\""});
  }
  options.backend_options = {queue_depth, io_threads, std::move(failpoints), journal_path};
  PyEngine made;
  raise_if_error(without_gil([&] { return Engine::create(options, &made.engine); }));
  return made;
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

std::pair<int, bool> open_for_engine(PyEngine&, const std::string& path, bool create, bool direct) {
  int fd = -1;
  bool is_direct = false;
  raise_if_error(without_gil(
      [&] { return open_file(path, {.create = create, .direct = direct}, &fd, &is_direct); }));
  return {fd, is_direct};
}

void close_file(PyEngine&, int fd) {
  const int error = without_gil([&] { return ::close(fd) == 0 ? 0 : errno; });
  if (error == 0) return;
  raise_if_error({Code::kStorage, std::string("close: ") + std::strerror(error), error});
}

std::string register_buffer(PyEngine& self, int64_t address, int64_t bytes) {
  const Status status = without_gil(
      [&] { return self.engine->register_buffer(reinterpret_cast<uint8_t*>(address), bytes); });
  if (status.code() == Code::kUsage) raise_if_error(status);
  return status.message();
}

nb::tuple next_completions(PyEngine& self, size_t max, double timeout_s) {
  const std::vector<Completion> taken =
      without_gil([&] { return self.engine->next_completions(max, timeout_s); });
  std::vector<int64_t> ids;
  std::vector<uint8_t> flags;
  for (const Completion& completion : taken) {
    ids.push_back(static_cast<int64_t>(completion.job_id));
    flags.push_back(completion.flags);
  }
  return nb::make_tuple(owned(std::move(ids)), owned(std::move(flags)));
}

nb::str name_of(std::string_view name) { return nb::str(name.data(), name.size()); }

nb::dict stats(PyEngine& self) {
  const EngineStats stats = without_gil([&] { return self.engine->stats(); });
  nb::dict result;
  for (int i = 0; i < kJobKinds; ++i) {
    const KindStats& kind = stats.kinds[static_cast<size_t>(i)];
    nb::dict row;
    row["jobs"] = kind.jobs;
    row["blocks"] = kind.blocks;
    row["bytes"] = kind.bytes;
    row["failed_blocks"] = kind.failed_blocks;
    row["latency_ns_total"] = kind.latency_ns_total;
    row["latency_ns_max"] = kind.latency_ns_max;
    result[name_of(job_kind_name(static_cast<JobKind>(i)))] = row;
  }
  for (int i = 0; i < kJobStates; ++i) {
    const std::string key = "jobs_" + std::string(job_state_name(static_cast<JobState>(i)));
    result[key.c_str()] = stats.jobs_by_state[static_cast<size_t>(i)];
  }
  result["copy_threads"] = stats.copy_threads;
  result["copy_queue_jobs"] = stats.copy_queue_jobs;
  result["io_in_flight"] = stats.io_in_flight;
  result["completions_waiting"] = stats.completions_waiting;
  result["completions_dropped"] = stats.completions_dropped;
  result["late_completions"] = stats.late_completions;
  result["quarantined_jobs"] = stats.quarantined_jobs;
  result["quarantined_bytes"] = stats.quarantined_bytes;
  return result;
}

nb::dict close_engine(PyEngine& self, double timeout_s) {
  const CloseReport report = without_gil([&] { return self.engine->close(timeout_s); });
  nb::dict result;
  result["cancelled_jobs"] = report.cancelled_jobs;
  result["abandoned_jobs"] = report.abandoned_jobs;
  result["abandoned_bytes"] = report.abandoned_bytes;
  return result;
}

void bind_job(nb::module_& module) {
  nb::class_<Job>(module, "Job",
                  "The shared handle of one batch. *Terminal*: its results are final. *Quiesced*: "
                  "nothing touches its memory any more; before that it may be neither reused nor "
                  "freed. Thread-safe, and usable after its engine was closed.")
      .def_prop_ro("id", &Job::id, "Number of the job, unique in its engine; ints from 1.")
      .def_prop_ro(
          "kind", [](const Job& job) { return name_of(job_kind_name(job.kind())); },
          "\"copy_in\", \"copy_out\", \"verify\", \"read\" or \"write\".")
      .def(
          "state", [](const Job& job) { return name_of(job_state_name(job.state())); },
          "\"running\", \"done\" (every block ok), \"failed\", \"timed_out\" or \"cancelled\".")
      .def("is_terminal", &Job::is_terminal, "Whether the results are final.")
      .def("is_quiesced", &Job::is_quiesced, "Whether nothing touches the memory any more.")
      .def("wait", &Job::wait, "timeout_s"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Wait without the GIL, doing some of the job's copying meanwhile. True once terminal.")
      .def("wait_quiesced", &Job::wait_quiesced, "timeout_s"_a,
           nb::call_guard<nb::gil_scoped_release>(), "Wait without the GIL. True once quiesced.")
      .def("cancel", &Job::cancel, nb::call_guard<nb::gil_scoped_release>(),
           "End the job and ask that its I/O be given up. True when this call ended it, False when "
           "it had already ended. Never blocks.")
      .def(
          "codes", [](const Job& job) { return results(job, &Job::codes); },
          "Outcome of every block as (n,) int32 of kvx::Code, -1 while undecided.")
      .def(
          "errnos", [](const Job& job) { return results(job, &Job::errnos); },
          "Errno behind every block's storage error as (n,) int32, else 0.")
      .def(
          "checksums", [](const Job& job) { return results(job, &Job::checksums); },
          "Checksum computed of every block as (n,) uint64; 0 where no bytes were seen.")
      .def(
          "raise_if_sync_failed", [](const Job& job) { raise_if_error(job.sync_status()); },
          "Raise StorageError with the errno of the first failed sync of a write job.")
      .def_prop_ro("blocks", &Job::blocks, "Number of blocks.")
      .def_prop_ro("bytes", &Job::bytes, "Bytes of all blocks.")
      .def_prop_ro("blocks_done", &Job::blocks_done, "Blocks that are ok so far.")
      .def_prop_ro("bytes_done", &Job::bytes_done, "Bytes of the blocks that are ok so far.")
      .def_prop_ro("latency_ns", &Job::latency_ns, "From submission to the end, or to now.")
      .def_prop_ro(
          "elapsed_s", [](const Job& job) { return static_cast<double>(job.latency_ns()) * 1e-9; },
          "`latency_ns` in seconds.");
}

void bind_submission(nb::class_<PyEngine>& engine) {
  engine
      .def("copy_in", &copy_in, "planes"_a, "ids"_a, "addresses"_a, "keys"_a, "deadline_s"_a,
           "Gather blocks `ids` (n,) int64 of planes (p, 3) int64 {base, stride, bytes} into host "
           "slots at `addresses` (n,) int64; checksums are computed under `keys` (n, 16) uint8. "
           "The memory must stay until the job is quiesced. Raises UsageError.")
      .def("copy_out", &copy_out, "addresses"_a, "keys"_a, "checksums"_a, "planes"_a, "ids"_a,
           "deadline_s"_a,
           "Scatter host slots to planes. A block that does not match `checksums` (n,) uint8 is "
           "corrupt and its target filled with 0xFF. Raises UsageError.")
      .def("verify", &verify, "addresses"_a, "block_bytes"_a, "keys"_a, "checksums"_a,
           "deadline_s"_a, "Check host slots against `checksums` (n,) uint64. Raises UsageError.")
      .def(
          "read", &read, "fds"_a, "offsets"_a, "addresses"_a, "block_bytes"_a, "io_bytes"_a,
          "keys"_a, "checksums"_a, "planes"_a.none(), "ids"_a.none(), "deadline_s"_a,
          "Read `io_bytes` (>= block_bytes; a multiple of 4096 for direct files) at each (fd "
          "int32, "
          "offset int64) into the slot at its address, verify, and with planes scatter in the same "
          "pass, each block as soon as it arrived. Raises UsageError.")
      .def("write", &write, "fds"_a, "offsets"_a, "addresses"_a, "bytes"_a, "sync_fds"_a,
           "deadline_s"_a,
           "Write `bytes` (n,) int64 of each address to (fd, offset); after all of them, fdatasync "
           "each of `sync_fds` (m,) int32. A block of a synced file is ok once the sync is. Raises "
           "UsageError.");
}

}  // namespace

void bind_engine(nb::module_& module) {
  bind_job(module);
  nb::class_<PyEngine> engine(
      module, "Engine",
      "Streams batches of blocks between planes, host slots and files on native threads. Deadlines "
      "are seconds from submission. Thread-safe; a context of close(1.0) if used in `with`.");
  engine
      .def(nb::new_(&make_engine), "copy_threads"_a = 0, "backend"_a = "auto", "queue_depth"_a = 64,
           "io_threads"_a = 4, "failpoints"_a.none() = nb::none(), "journal_path"_a = "",
           "Start threads: `copy_threads` (0: one a CPU), a reactor, and those of the backend "
           "(\"auto\", \"uring\", \"posix\"). Raises UsageError, UnavailableError.")
      .def(
          "__enter__", [](nb::object self) { return self; }, "Nothing but the engine.")
      .def(
          "__exit__", [](PyEngine& self, nb::args) { (void)close_engine(self, 1.0); },
          "Close with a bound of a second.")
      .def_prop_ro(
          "backend_name", [](PyEngine& self) { return name_of(self.engine->backend_name()); },
          "The backend in use, decorators included.")
      .def_prop_ro(
          "backend_reason", [](PyEngine& self) { return self.engine->backend_reason(); },
          "Why io_uring is not in use; empty when it is, or was not asked for.")
      .def("open_file", &open_for_engine, "path"_a, nb::kw_only(), "create"_a = false,
           "direct"_a = true,
           "Open for reading and writing, mode 0600: (fd, is_direct). Raises StorageError.")
      .def("close_file", &close_file, "fd"_a, "Close a descriptor. Raises StorageError.")
      .def(
          "preallocate",
          [](PyEngine&, int fd, int64_t offset, int64_t bytes) {
            raise_if_error(without_gil([&] { return preallocate(fd, offset, bytes); }));
          },
          "fd"_a, "offset"_a, "bytes"_a,
          "Reserve a range so that writes cannot meet ENOSPC. Raises StorageError.")
      .def("register_buffer", &register_buffer, "address"_a, "bytes"_a,
           "Pin a buffer for faster I/O; empty, or why not (which is no error).")
      .def(
          "unregister_buffer",
          [](PyEngine& self, int64_t address) {
            without_gil([&] {
              self.engine->unregister_buffer(reinterpret_cast<uint8_t*>(address));
              return 0;
            });
          },
          "address"_a, "Undo `register_buffer`. No I/O inside it may be in flight.")
      .def(
          "next_completions", &next_completions, "max"_a, "timeout_s"_a,
          "Wait without the GIL for notifications: (ids (k,) int64, flags (k,) uint8), 1 terminal, "
          "2 quiesced, 3 both. Empty when time is up or the engine is closed.")
      .def(
          "fileno", [](PyEngine& self) { return self.engine->fileno(); },
          "An eventfd that is readable while notifications wait. Belongs to the engine.")
      .def(
          "quarantined_jobs", [](PyEngine& self) { return self.engine->stats().quarantined_jobs; },
          "Jobs that have ended while their memory is still in use.")
      .def(
          "quarantined_bytes",
          [](PyEngine& self) { return self.engine->stats().quarantined_bytes; },
          "Bytes of the jobs in quarantine.")
      .def("stats", &stats, "Counters by kind of job and by state, queue lengths, late I/O.")
      .def("close", &close_engine, "timeout_s"_a,
           "Refuse new jobs, let running ones end for half the time, cancel the rest, and wait for "
           "their memory. Returns cancelled_jobs, abandoned_jobs and abandoned_bytes; abandoned "
           "memory must never be freed. Later calls return the same.");
  bind_submission(engine);
}

}  // namespace kvx::bind
