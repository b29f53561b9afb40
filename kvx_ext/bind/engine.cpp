#include "kvx/engine.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

PyEngine make_engine(int copy_threads, const std::string& backend, int queue_depth, int io_threads,
                     std::shared_ptr<Failpoints> failpoints, const std::string& journal_path) {
  EngineOptions options;
  options.copy_threads = copy_threads;
  if (backend == "io_uring") {
    options.backend = BackendKind::kUring;
  } else if (backend == "posix") {
    options.backend = BackendKind::kPosix;
  } else if (backend != "auto") {
    raise_if_error(
        {Code::kUsage, "backend is \"auto\", \"io_uring\" or \"posix\", not \"" + backend + "\""});
  }
  options.backend_options = {queue_depth, io_threads, std::move(failpoints), journal_path};
  PyEngine made;
  raise_if_error(without_gil([&] { return Engine::create(options, &made.engine); }));
  return made;
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
           "(\"auto\", \"io_uring\", \"posix\"). Raises UsageError, UnavailableError.")
      .def(
          "__enter__", [](nb::object self) { return self; },
          nb::sig("def __enter__(self) -> Engine"), "Nothing but the engine.")
      .def(
          "__exit__", [](PyEngine& self, nb::args) { (void)close_engine(self, 1.0); },
          nb::sig("def __exit__(self, *exception: object) -> None"),
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
          nb::sig("def next_completions(self, max: int, timeout_s: float) -> "
                  "tuple[NDArray[numpy.int64], NDArray[numpy.uint8]]"),
          "Wait without the GIL for notifications: (ids (k,) int64, flags (k,) uint8), 1 terminal, "
          "2 quiesced, 3 both. Empty when time is up or the engine is closed.")
      .def(
          "wake", [](PyEngine& self) { self.engine->wake(); },
          "Make one `next_completions` return now, with a notification of job 0, which is none.")
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
      .def("stats", &stats, nb::sig("def stats(self) -> dict[str, object]"),
           "Counters by kind of job and by state, queue lengths, late I/O.")
      .def("close", &close_engine, "timeout_s"_a,
           nb::sig("def close(self, timeout_s: float) -> dict[str, int]"),
           "Refuse new jobs, let running ones end for half the time, cancel the rest, and wait for "
           "their memory. Returns cancelled_jobs, abandoned_jobs and abandoned_bytes; abandoned "
           "memory must never be freed. Later calls return the same.");
  bind_submission(engine);
}

}  // namespace kvx::bind
