#include "kvx/job.h"

#include <nanobind/stl/shared_ptr.h>

#include "engine.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

template <typename T>
Array<T> results(const Job& job, void (Job::*fill)(std::span<T>) const) {
  std::vector<T> values(static_cast<size_t>(job.blocks()));
  {
    nb::gil_scoped_release release;
    (job.*fill)(values);
  }
  return owned(std::move(values));
}

}  // namespace

void bind_job(nb::module_& module) {
  nb::class_<Job>(
      module, "Job",
      "The shared handle of one batch. *Terminal*: its results are final. *Quiesced*: "
      "nothing touches its memory any more; before that it may be neither reused nor "
      "freed, but for its planes, which are *at rest* once it is terminal and no copy "
      "from or to them is running. Thread-safe, and usable after its engine was closed.")
      .def_prop_ro("id", &Job::id, "Number of the job, unique in its engine; ints from 1.")
      .def_prop_ro(
          "kind", [](const Job& job) { return name_of(job_kind_name(job.kind())); },
          "\"copy_in\", \"copy_out\", \"verify\", \"read\" or \"write\".")
      .def(
          "state", [](const Job& job) { return name_of(job_state_name(job.state())); },
          "\"running\", \"done\" (every block ok), \"failed\", \"timed_out\" or \"cancelled\".")
      .def("is_terminal", &Job::is_terminal, "Whether the results are final.")
      .def("is_at_rest", &Job::is_at_rest, "Whether nothing touches the planes any more.")
      .def("is_quiesced", &Job::is_quiesced, "Whether nothing touches the memory any more.")
      .def("wait", &Job::wait, "timeout_s"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Wait without the GIL, doing some of the job's copying meanwhile. True once terminal.")
      .def("wait_at_rest", &Job::wait_at_rest, "timeout_s"_a,
           nb::call_guard<nb::gil_scoped_release>(), "Wait without the GIL. True once at rest.")
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

}  // namespace kvx::bind
