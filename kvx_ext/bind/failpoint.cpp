#include "kvx/failpoint.h"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <string>

#include "bind.h"
#include "kvx/backend_factory.h"

namespace nb = nanobind;

namespace kvx::bind {

namespace {

void set_rule(Failpoints& self, const std::string& operation, const std::string& action,
              int64_t after, int64_t count, double probability, uint64_t seed, double delay_s,
              bool ignores_cancel, bool torn_reports_error) {
  FaultRule rule;
  raise_if_error(parse_fault_target(operation, &rule.target));
  raise_if_error(parse_fault_action(action, &rule.action));
  rule.after = after;
  rule.count = count;
  rule.probability = probability;
  rule.seed = seed;
  rule.delay_s = delay_s;
  rule.ignores_cancel = ignores_cancel;
  rule.torn_reports_error = torn_reports_error;
  Status status;
  {
    nb::gil_scoped_release release;
    status = self.set(rule);
  }
  raise_if_error(status);
}

nb::dict hits(const Failpoints& self) {
  std::array<int64_t, kFaultActions> counts;
  {
    nb::gil_scoped_release release;
    counts = self.hits();
  }
  nb::dict result;
  for (size_t i = 0; i < kFaultActions; ++i) {
    const std::string_view name = fault_action_name(static_cast<FaultAction>(i));
    result[nb::str(name.data(), name.size())] = counts[i];
  }
  return result;
}

std::string probe() {
  nb::gil_scoped_release release;
  return probe_io_uring().message();
}

constexpr const char* kSetDoc =
    R"(Make file operations go wrong; a rule for the same operation and action is replaced.

Rules are asked in the order they were set and the first that hits decides.

Args:
    operation: "read", "write", "sync", "any" of these, or "copy" (one block on a copy thread;
        delay, hang, flip).
    action: "eio", "enospc" (fail, nothing moves); "short" (half moves, then a short transfer);
        "delay" (starts `delay_s` late); "hang" (does not start until clear()); "torn" (some
        512-byte sectors of a write keep what they held); "flip" (one bit is wrong, success);
        "drop" (nothing moves, success).
    after: Matching operations that pass first.
    count: Operations to spoil, -1 for all.
    probability: Of each, 0..1.
    seed: Decides the probability, the bit and the sectors.
    delay_s: For "delay", seconds.
    ignores_cancel: For "hang": cancelling and closing do not end it, as on a dying device.
    torn_reports_error: For "torn": fail with EIO instead of claiming success.

Raises:
    UsageError: An unknown name, a value out of range, or a pair that makes no sense (torn read).)";

}  // namespace

void bind_failpoint(nb::module_& module) {
  nb::class_<Failpoints>(module, "Failpoints",
                         "Faults on purpose in file I/O and copies, for tests. Thread-safe; rules "
                         "may change while I/O runs.")
      .def(nb::init<>(), "Start without rules.")
      .def("set", &set_rule, nb::arg("operation"), nb::arg("action"), nb::kw_only(),
           nb::arg("after") = 0, nb::arg("count") = -1, nb::arg("probability") = 1.0,
           nb::arg("seed") = 0, nb::arg("delay_s") = 0.0, nb::arg("ignores_cancel") = false,
           nb::arg("torn_reports_error") = false, kSetDoc)
      .def("clear", &Failpoints::clear, nb::call_guard<nb::gil_scoped_release>(),
           "Drop all rules and let everything that hangs go on. The counters stay.")
      .def("hits", &hits, nb::sig("def hits(self) -> dict[str, int]"),
           "Return how many operations each action has spoiled so far.");
  module.def("probe_io_uring", &probe,
             "Return why io_uring cannot be used here; empty when it works.");
}

}  // namespace kvx::bind
