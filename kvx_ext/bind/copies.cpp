#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "blocks.h"
#include "copy_plan.h"
#include "device.h"
#include "engine.h"
#include "kvx/block_runs.h"
#include "kvx/copy_tickets.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

struct PyCopies {
  std::unique_ptr<CopyTickets> tickets;
  std::optional<int64_t> abandoned;  // once closed

  PyCopies() = default;
  PyCopies(PyCopies&&) = default;
  PyCopies& operator=(PyCopies&&) = default;
  ~PyCopies() {
    if (tickets == nullptr) return;
    if (!abandoned &&
        PyErr_WarnEx(PyExc_ResourceWarning, "copies of a device were not closed", 1) != 0) {
      PyErr_WriteUnraisable(nullptr);
    }
    nb::gil_scoped_release release;
    tickets.reset();
  }
};

PyCopies make_copies(PyDevice& device, const std::string& sm, int ctas, int64_t staging_bytes,
                     const std::optional<Rates>& calibration,
                     const std::optional<PlainRates>& plain) {
  const CopyOptions options = copy_options(sm, ctas, staging_bytes, calibration, plain);
  PyCopies made;
  Device& native = device.open();
  raise_if_error(without_gil([&] { return CopyTickets::create(native, options, &made.tickets); }));
  return made;
}

uint64_t submit(PyCopies& self, const std::string& direction, const Row<uint64_t>& targets,
                const Row<uint64_t>& sources, const Row<uint64_t>& bytes,
                const PyStreamMark* after) {
  CopyRequest request;
  request.direction = direction_named(direction);
  request.runs.targets.assign(view(targets).begin(), view(targets).end());
  request.runs.sources.assign(view(sources).begin(), view(sources).end());
  request.runs.bytes.assign(view(bytes).begin(), view(bytes).end());
  if (after != nullptr) request.after = after->native;
  return without_gil([&] { return self.tickets->submit(std::move(request)); });
}

uint64_t submit_blocks(PyCopies& self, const std::string& direction, uint64_t target_base,
                       const Blocks& targets, uint64_t source_base, const Blocks& sources,
                       const PyStreamMark* after) {
  CopyRequest request;
  request.direction = direction_named(direction);
  raise_if_error(
      pair_blocks(rows_of(targets), target_base, rows_of(sources), source_base, &request.runs));
  if (after != nullptr) request.after = after->native;
  return without_gil([&] { return self.tickets->submit(std::move(request)); });
}

std::vector<std::tuple<uint64_t, int, int>> wait_any(PyCopies& self, double timeout_s) {
  std::vector<std::tuple<uint64_t, int, int>> taken;
  for (const auto& [ticket, completion] :
       without_gil([&] { return self.tickets->wait_any(timeout_s); })) {
    taken.emplace_back(ticket, static_cast<int>(completion.code), completion.driver_error);
  }
  return taken;
}

int wait(PyCopies& self, uint64_t ticket, double timeout_s) {
  CopyCompletion completion;
  const Status status =
      without_gil([&] { return self.tickets->wait(ticket, timeout_s, &completion); });
  if (status.code() == Code::kTimeout) return static_cast<int>(Code::kTimeout);
  raise_if_error(status);
  return static_cast<int>(completion.code);
}

nb::dict stats(PyCopies& self) {
  return stats_dict(without_gil([&] { return self.tickets->stats(); }));
}

int64_t close(PyCopies& self, double timeout_s) {
  if (!self.abandoned) {
    self.abandoned = without_gil([&] { return self.tickets->close(timeout_s); });
  }
  return *self.abandoned;
}

}  // namespace

nb::dict stats_dict(const CopyStats& stats) {
  nb::dict result;
  for (size_t i = 0; i < kCopyDirections; ++i) {
    const std::string name(copy_direction_name(static_cast<CopyDirection>(i)));
    result[("bytes_" + name).c_str()] = stats.bytes[i];
    result[("requests_" + name).c_str()] = stats.requests[i];
  }
  for (size_t i = 0; i < kCopyMethods; ++i) {
    const std::string name(copy_method_name(static_cast<CopyMethod>(i)));
    result[("runs_" + name).c_str()] = stats.runs_by_method[i];
    result[("calls_" + name).c_str()] = stats.calls_by_method[i];
  }
  result["kernels_launched"] = stats.kernels_launched;
  result["pageable_bytes"] = stats.pageable_bytes;
  result["submit_ns"] = stats.submit_ns;
  result["prepare_ns"] = stats.prepare_ns;
  result["in_flight"] = stats.in_flight;
  return result;
}

CopyOptions copy_options(const std::string& sm, int ctas, int64_t staging_bytes,
                         const std::optional<Rates>& calibration,
                         const std::optional<PlainRates>& plain) {
  if (sm != "auto" && sm != "never") {
    raise_if_error({Code::kUsage, "sm is \"auto\" or \"never\", not \"" + sm + "\""});
  }
  return {.sm = sm == "auto" ? SmUse::kAuto : SmUse::kNever,
          .ctas = ctas,
          .staging_bytes = staging_bytes,
          .calibration = calibration_of(calibration, plain)};
}

void bind_copies(nb::module_& module) {
  nb::class_<PyCopies>(module, "Copies",
                       "Copies to, from and within a device, in streams of their own. Memory they "
                       "name must live until they have completed.")
      .def(nb::new_(&make_copies), "device"_a, nb::kw_only(), "sm"_a = "auto", "ctas"_a = 4,
           "staging_bytes"_a = int64_t{64} << 20, "calibration"_a = nb::none(),
           "plain"_a = nb::none(),
           "Start the threads. `sm`: \"auto\" lets small fragments go by a kernel of `ctas` CTAs "
           "and `staging_bytes` of device memory a direction, \"never\" launches none. "
           "`calibration` and `plain` as in `plan_copies`.")
      .def(
          "__enter__", [](nb::object self) { return self; },
          nb::sig("def __enter__(self) -> Copies"), "Nothing but the copies.")
      .def(
          "__exit__", [](PyCopies& self, nb::args) { (void)close(self, 1.0); },
          nb::sig("def __exit__(self, *exception: object) -> None"),
          "Close with a bound of a second.")
      .def("submit", &submit, "direction"_a, "targets"_a, "sources"_a, "bytes"_a,
           "after"_a.none() = nb::none(),
           "Copy (n,) uint64 runs in `direction` (\"h2d\", \"d2h\", \"d2d\"), not before `after`. "
           "Returns a ticket at once. Submissions are in no order to each other.")
      .def("wait", &wait, "ticket"_a, "timeout_s"_a,
           "Wait without the GIL for a ticket, once: its kvx::Code, 0 when the bytes are there; 8 "
           "when time is up, and the ticket stays good. Raises UsageError for any other ticket.")
      .def("submit_blocks", &submit_blocks, "direction"_a, "target_base"_a, "targets"_a.noconvert(),
           "source_base"_a, "sources"_a.noconvert(), "after"_a.none() = nb::none(),
           "As `submit`, for blocks on both sides: (n, 4) int64 rows of offset, stride, count and "
           "bytes from each base on, which were checked. Raises UsageError when the totals of a "
           "block differ.")
      .def("wait_any", &wait_any, "timeout_s"_a,
           "Wait without the GIL until copies have completed, and take them: (ticket, kvx::Code, "
           "CUresult) each. Empty when time is up or after `wake`. For one reader, beside whom "
           "nobody calls `wait`.")
      .def(
          "wake", [](PyCopies& self) { self.tickets->wake(); }, "Make one `wait_any` return.")
      .def(
          "cancel", [](PyCopies& self, uint64_t ticket) { self.tickets->cancel(ticket); },
          "ticket"_a, "Ask that a copy be given up; its ticket tells (9) whether it was.")
      .def("stats", &stats, nb::sig("def stats(self) -> dict[str, int]"),
           "Bytes and requests by direction, runs and driver calls by method, and more.")
      .def("close", &close, "timeout_s"_a,
           "Cancel what has not begun and wait for the rest. Returns how many copies had to be "
           "abandoned: their memory must never be freed. Later calls return the same.");
  module.def(
      "find_overlap", [](const Blocks& blocks) { return find_overlap(rows_of(blocks)); },
      "blocks"_a.noconvert(),
      "The number of a block, of (n, 4) int64 checked rows, that has bytes in common with another "
      "one; -1 when none has.");
}

}  // namespace kvx::bind
