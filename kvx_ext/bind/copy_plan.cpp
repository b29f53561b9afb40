#include "copy_plan.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

CopyDirection direction_named(const std::string& name) {
  for (size_t i = 0; i < kCopyDirections; ++i) {
    if (copy_direction_name(static_cast<CopyDirection>(i)) == name) {
      return static_cast<CopyDirection>(i);
    }
  }
  raise_if_error({Code::kUsage, "direction is \"h2d\", \"d2h\" or \"d2d\", not \"" + name + "\""});
  return CopyDirection::kHostToDevice;
}

CopyCalibration calibration_of(const std::optional<Rates>& rates,
                               const std::optional<PlainRates>& plain) {
  CopyCalibration made;
  if (rates) std::copy_n(rates->data(), rates->size(), &made.gb_s[0][0][0]);
  if (plain) std::copy_n(plain->data(), plain->size(), made.plain_gb_s.data());
  return made;
}

namespace {

using Spans = nb::ndarray<const uint64_t, nb::shape<-1, 3>, nb::c_contig, nb::device::cpu>;

CopyMethod method_named(const std::string& name) {
  for (size_t i = 0; i < kCopyMethods; ++i) {
    if (copy_method_name(static_cast<CopyMethod>(i)) == name) return static_cast<CopyMethod>(i);
  }
  raise_if_error({Code::kUsage, "no copy method \"" + name + "\""});
  return CopyMethod::kSingle;
}

// What one plan is made from, checked and in the planner's own types.
struct Question {
  CopyDirection direction;
  CopyRuns runs;
  CopyCalibration calibration;
  CopyLimits limits;
  std::vector<CopyLimits::PinnedSpan> pinned;
};

Question ask(const std::string& direction, const Row<uint64_t>& targets,
             const Row<uint64_t>& sources, const Row<uint64_t>& bytes,
             const std::optional<Rates>& calibration, const std::optional<PlainRates>& plain,
             bool has_batch, bool has_kernels, int64_t staging_bytes,
             const std::optional<Spans>& pinned, int64_t batch_runs_max) {
  if (targets.size() != sources.size() || targets.size() != bytes.size()) {
    raise_if_error({Code::kUsage, "targets, sources and bytes differ in length"});
  }
  Question question{.direction = direction_named(direction),
                    .runs = {},
                    .calibration = {},
                    .limits = {},
                    .pinned = {}};
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes.data()[i] == 0) raise_if_error({Code::kUsage, "a run has no bytes"});
    question.runs.add(targets.data()[i], sources.data()[i], bytes.data()[i]);
  }
  question.calibration = calibration_of(calibration, plain);
  question.limits = {.has_batch = has_batch,
                     .has_kernels = has_kernels,
                     .staging_bytes = staging_bytes,
                     .batch_runs_max = batch_runs_max,
                     .pinned = {}};
  for (size_t i = 0; pinned && i < pinned->shape(0); ++i) {
    const uint64_t* row = pinned->data() + 3 * i;
    question.pinned.push_back({.base = row[0], .bytes = row[1], .piece_bytes = row[2]});
  }
  return question;
}

using ArraysByName = nb::typed<nb::dict, nb::str, nb::object>;

ArraysByName plan_as_arrays(CopyPlan plan) {
  std::vector<uint8_t> methods;
  std::vector<int64_t> calls;
  for (const CopyCall& call : plan.calls) {
    methods.push_back(static_cast<uint8_t>(call.method));
    calls.insert(calls.end(),
                 {static_cast<int64_t>(call.first), static_cast<int64_t>(call.count),
                  call.target_stride, call.source_stride, static_cast<int64_t>(call.bytes)});
  }
  const size_t count = plan.calls.size();
  ArraysByName result;
  result["targets"] = adopt_row(std::move(plan.runs.targets));
  result["sources"] = adopt_row(std::move(plan.runs.sources));
  result["bytes"] =
      adopt_row(std::vector<uint64_t>(plan.runs.bytes.begin(), plan.runs.bytes.end()));
  result["methods"] = adopt_row(std::move(methods));
  result["calls"] = adopt<int64_t, 2>(std::move(calls), {count, 5});
  result["total_bytes"] = plan.total_bytes;
  return result;
}

ArraysByName plan_once(const std::string& direction, const Row<uint64_t>& targets,
                       const Row<uint64_t>& sources, const Row<uint64_t>& bytes,
                       const std::optional<Rates>& calibration,
                       const std::optional<PlainRates>& plain, bool has_batch, bool has_kernels,
                       int64_t staging_bytes, const std::optional<Spans>& pinned,
                       int64_t batch_runs_max) {
  Question question = ask(direction, targets, sources, bytes, calibration, plain, has_batch,
                          has_kernels, staging_bytes, pinned, batch_runs_max);
  question.limits.pinned = question.pinned;
  CopyPlan plan;
  plan_copies(question.direction, question.runs, question.calibration, question.limits, &plan);
  return plan_as_arrays(std::move(plan));
}

double time_plan(const std::string& direction, const Row<uint64_t>& targets,
                 const Row<uint64_t>& sources, const Row<uint64_t>& bytes,
                 const std::optional<Rates>& calibration, const std::optional<PlainRates>& plain,
                 bool has_batch, bool has_kernels, int64_t staging_bytes,
                 const std::optional<Spans>& pinned, int64_t batch_runs_max, int repeats) {
  Question question = ask(direction, targets, sources, bytes, calibration, plain, has_batch,
                          has_kernels, staging_bytes, pinned, batch_runs_max);
  question.limits.pinned = question.pinned;
  nb::gil_scoped_release release;
  CopyPlan plan;
  plan_copies(question.direction, question.runs, question.calibration, question.limits, &plan);
  const auto began = std::chrono::steady_clock::now();
  for (int i = 0; i < repeats; ++i) {
    plan_copies(question.direction, question.runs, question.calibration, question.limits, &plan);
  }
  const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - began;
  return took.count() / std::max(repeats, 1);
}

void bind_planning(nb::module_& module) {
  module.def(
      "plan_copies", &plan_once, "direction"_a, "targets"_a, "sources"_a, "bytes"_a,
      "calibration"_a = nb::none(), "plain"_a = nb::none(), nb::kw_only(), "has_batch"_a = true,
      "has_kernels"_a = false, "staging_bytes"_a = 0, "pinned"_a = nb::none(),
      "batch_runs_max"_a = 8192,
      "Plan the copy of (n,) uint64 runs; `direction` is \"h2d\", \"d2h\" or \"d2d\". Copies "
      "nothing.\n\n"
      "`calibration` (3, 4, 11) float64 GB/s by direction, method and size, `plain` (3,); None: "
      "the "
      "published defaults. `pinned` (m, 3) uint64 rows of base, bytes and piece bytes, by base.\n"
      "Returns the merged runs as `targets`, `sources`, `bytes`; the calls as `methods` (k,) uint8 "
      "and `calls` (k, 5) int64 rows of first, count, target stride, source stride, bytes; "
      "`total_bytes`. No run may be empty, no target may overlap another one or a source. "
      "Source: kvx/copy_plan.h.");
  module.def(
      "time_plan_copies", &time_plan, "direction"_a, "targets"_a, "sources"_a, "bytes"_a,
      "calibration"_a = nb::none(), "plain"_a = nb::none(), nb::kw_only(), "has_batch"_a = true,
      "has_kernels"_a = false, "staging_bytes"_a = 0, "pinned"_a = nb::none(),
      "batch_runs_max"_a = 8192, "repeats"_a = 1000,
      "For benchmarks: nanoseconds that `plan_copies` takes natively into a plan used before, "
      "averaged over `repeats`.");
}

// What the planner decides by.
void bind_prediction(nb::module_& module) {
  module.def(
      "predicted_copy_ns",
      [](const std::string& direction, const std::string& method, size_t bytes,
         const std::optional<Rates>& calibration, const std::optional<PlainRates>& plain) {
        return predicted_copy_ns(
            calibration ? calibration_of(calibration, plain) : CopyCalibration::defaults(),
            direction_named(direction), method_named(method), bytes);
      },
      "direction"_a, "method"_a, "bytes"_a, "calibration"_a = nb::none(), "plain"_a = nb::none(),
      "What the planner takes one run of `bytes` to cost by a method, without the cost of a call; "
      "infinite where the method was not measured.");
  module.def(
      "default_copy_calibration",
      [] {
        const CopyCalibration defaults = CopyCalibration::defaults();
        const double* first = &defaults.gb_s[0][0][0];
        const size_t count = kCopyDirections * kCopyMethods * kCalibratedSizes;
        return nb::make_tuple(
            adopt<double, 3>(std::vector<double>(first, first + count),
                             {kCopyDirections, kCopyMethods, kCalibratedSizes}),
            adopt_row(std::vector<double>(defaults.plain_gb_s.begin(), defaults.plain_gb_s.end())));
      },
      nb::sig("def default_copy_calibration() -> "
              "tuple[NDArray[numpy.float64], NDArray[numpy.float64]]"),
      "The published numbers that planning starts from: GB/s (3, 4, 11) and of plain copies (3,).");
  module.def(
      "copy_methods", [] { return nb::make_tuple("batch", "rows", "single", "staged"); },
      nb::sig("def copy_methods() -> tuple[str, ...]"), "Names of the methods, in order.");
  module.def(
      "copy_directions", [] { return nb::make_tuple("h2d", "d2h", "d2d"); },
      nb::sig("def copy_directions() -> tuple[str, ...]"), "Names of the directions, in order.");
  module.attr("ROWS_CALL_NS") = kRowsCallNs;
  module.attr("STAGED_CALL_NS") = kStagedCallNs;
}

}  // namespace

void bind_copy_plan(nb::module_& module) {
  bind_planning(module);
  bind_prediction(module);
}

}  // namespace kvx::bind
