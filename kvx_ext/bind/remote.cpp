#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include "agent.h"
#include "kvx/tls_context.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

// Immutable once made, and shared with the transfers that use it.
struct PyPlan {
  std::shared_ptr<const RemotePlan> plan;
};

void make_plan(PyPlan* self, PyAgent& agent, uint32_t region, const Blocks& local,
               uint32_t remote_region, const Blocks& remote,
               const std::optional<Row<uint32_t>>& indices,
               const std::optional<Row<uint64_t>>& checksums,
               const std::optional<BlockKeys>& keys) {
  auto plan = std::make_shared<RemotePlan>();
  plan->region = region;
  plan->local = blocks_of(local);
  plan->remote_region = remote_region;
  plan->remote = blocks_of(remote);
  plan->indices = copied(indices);
  plan->checksums = copied(checksums);
  plan->keys = copied(keys);
  Status status;
  {
    nb::gil_scoped_release release;
    const RegionHold hold = agent.agent->hold_region(region);
    status = hold ? finish_plan(plan.get(), hold->bytes())
                  : Status{Code::kStale, "the local memory is not registered any more"};
  }
  raise_if_error(status);
  new (self) PyPlan{std::move(plan)};
}

std::shared_ptr<RemoteJob> submit(PyAgent& self, bool is_write, int way, uint64_t peer,
                                  const std::tuple<uint64_t, uint32_t, uint64_t>& lease,
                                  const PyPlan& plan, double deadline_s, const nb::bytes& note) {
  RemoteRequest request{.is_write = is_write,
                        .way = way == 1 ? Way::kPull : Way::kStream,
                        .peer = peer,
                        .lease = {std::get<0>(lease), std::get<1>(lease), std::get<2>(lease)},
                        .plan = plan.plan,
                        .deadline_s = deadline_s};
  const auto* bytes = reinterpret_cast<const uint8_t*>(note.c_str());
  request.note.assign(bytes, bytes + note.size());
  std::shared_ptr<RemoteJob> job;
  Status status;
  {
    nb::gil_scoped_release release;
    status = self.agent->submit(std::move(request), &job);
  }
  raise_if_error(status);
  return job;
}

template <typename T>
NumpyRow<T> results(const RemoteJob& job, void (RemoteJob::*fill)(std::span<T>) const) {
  NewRow<T> row(static_cast<size_t>(job.blocks()));
  (job.*fill)(row.span());
  return row.numpy();
}

void bind_plan(nb::module_& module) {
  nb::class_<PyPlan>(module, "RemotePlan",
                     "What both sides of a transfer are: checked once, used any number of times.")
      .def("__init__", &make_plan, "agent"_a, "region"_a, "local"_a.noconvert(), "remote_region"_a,
           "remote"_a.noconvert(), "indices"_a.none() = nb::none(),
           "checksums"_a.none() = nb::none(), "keys"_a.none() = nb::none(),
           "Blocks are (n, 4) int64 rows of offset, stride, count and bytes, of `region` of this "
           "agent and `remote_region` of the peer. `indices` (n,) uint32 names them in the lease; "
           "None: they lie within a lease of a range. `checksums` (n,) uint64 are expected, under "
           "`keys` (n, 16) uint8.")
      .def_prop_ro(
          "blocks", [](const PyPlan& self) { return self.plan->local.size(); }, "Number of blocks.")
      .def_prop_ro(
          "bytes", [](const PyPlan& self) { return self.plan->total_bytes; },
          "Bytes of all blocks.");
}

void bind_remote_job(nb::module_& module) {
  nb::class_<RemoteJob>(module, "RemoteJob",
                        "The shared handle of one transfer with a peer. *Terminal*: its results "
                        "are final. *Quiesced*: nothing of ours touches its local memory, and the "
                        "receiver of a write is known to have stopped. Thread-safe.")
      .def_prop_ro("id", &RemoteJob::id, "Number of the transfer, unique in its agent.")
      .def(
          "state",
          [](const RemoteJob& job) {
            const std::string_view name = job_state_name(job.state());
            return nb::str(name.data(), name.size());
          },
          "\"running\", \"done\" (every block ok), \"failed\", \"timed_out\" or \"cancelled\".")
      .def("is_terminal", &RemoteJob::is_terminal, "Whether the results are final.")
      .def("is_quiesced", &RemoteJob::is_quiesced, "Whether its bytes have stopped.")
      .def("is_lost", &RemoteJob::is_lost, "Whether it failed because the peer is gone.")
      .def("wait", &RemoteJob::wait, "timeout_s"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Wait without the GIL, receiving or copying meanwhile. True once terminal.")
      .def("wait_quiesced", &RemoteJob::wait_quiesced, "timeout_s"_a,
           nb::call_guard<nb::gil_scoped_release>(), "Wait without the GIL. True once quiesced.")
      .def("cancel", &RemoteJob::cancel, nb::call_guard<nb::gil_scoped_release>(),
           "Ask to stop. False when it had ended. A read ends now, a write when the peer says how "
           "far it came, or soon after.")
      .def("watch", &RemoteJob::watch, nb::call_guard<nb::gil_scoped_release>(),
           "Ask for an event when it ends; True when it has ended, and none will come.")
      .def(
          "codes", [](const RemoteJob& job) { return results(job, &RemoteJob::codes); },
          "Outcome of every block as (n,) int32 of kvx::Code, -1 while undecided.")
      .def(
          "errnos", [](const RemoteJob& job) { return results(job, &RemoteJob::errnos); },
          "Errno behind every block's failure as (n,) int32, else 0.")
      .def(
          "checksums", [](const RemoteJob& job) { return results(job, &RemoteJob::checksums); },
          "Checksum computed of every block that arrived as (n,) uint64, else 0.")
      .def_prop_ro("blocks", &RemoteJob::blocks, "Number of blocks.")
      .def_prop_ro("bytes", &RemoteJob::bytes, "Bytes of all blocks.")
      .def_prop_ro("blocks_done", &RemoteJob::blocks_done, "Blocks that are ok so far.")
      .def_prop_ro("bytes_done", &RemoteJob::bytes_done, "Bytes of the blocks that are ok so far.")
      .def_prop_ro("latency_ns", &RemoteJob::latency_ns, "From submission to the end, or to now.");
}

void bind_tls(nb::module_& module) {
  nb::class_<TlsContext>(module, "TlsContext", "Certificates and keys of agents' connections.")
      .def(nb::new_([](const std::string& certificate, const std::string& private_key,
                       const std::string& authority) {
             std::shared_ptr<TlsContext> context;
             raise_if_error(TlsContext::create({certificate, private_key, authority}, &context));
             return context;
           }),
           "certificate"_a, "private_key"_a, "authority"_a,
           "Files in PEM. UnavailableError: there is no libssl here.");
}

}  // namespace

void bind_remote(nb::module_& module) {
  bind_tls(module);
  bind_remote_job(module);
}

void bind_submission(nb::module_& module, nb::class_<PyAgent>& agent) {
  bind_plan(module);
  agent.def("submit", &submit, nb::kw_only(), "is_write"_a, "way"_a, "peer"_a, "lease"_a, "plan"_a,
            "deadline_s"_a, "note"_a,
            "Start a transfer over blocks of a `lease` (id, slot, generation) of `peer`. `way`: 0 "
            "through the connections, 1 copied on this host. `note` is delivered to the peer once "
            "all bytes have arrived. Never blocks on the work.");
}

}  // namespace kvx::bind
