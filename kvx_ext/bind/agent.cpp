#include "agent.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "kvx/tls_context.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

using Context = std::shared_ptr<TlsContext>;
using Payload = nb::bytes;
using Event = std::tuple<int, uint64_t, uint64_t, uint64_t, nb::bytes>;

template <typename Call>
void checked(Call call) {
  Status status;
  {
    nb::gil_scoped_release release;
    status = call();
  }
  raise_if_error(status);
}

std::span<const uint8_t> view(const Payload& payload) {
  return {reinterpret_cast<const uint8_t*>(payload.c_str()), payload.size()};
}

void create(PyAgent* self, int io_threads, int copy_threads, double greeting_s, int greetings_max,
            double ping_s, int64_t piece_bytes, double cancel_grace_s) {
  const AgentOptions options{io_threads, copy_threads, greeting_s,    greetings_max,
                             ping_s,     piece_bytes,  cancel_grace_s};
  PyAgent made;
  checked([&] { return Agent::create(options, &made.agent); });
  new (self) PyAgent(std::move(made));
}

std::vector<Event> next_events(PyAgent& self, size_t max, double timeout_s) {
  std::vector<AgentEvent> events;
  {
    nb::gil_scoped_release release;
    events = self.agent->next_events(max, timeout_s);
  }
  std::vector<Event> found;
  found.reserve(events.size());
  for (const AgentEvent& event : events) {
    const auto* payload = reinterpret_cast<const char*>(event.payload.data());
    found.emplace_back(static_cast<int>(event.kind), event.connection, event.peer, event.id,
                       nb::bytes(payload, event.payload.size()));
  }
  return found;
}

void bind_connections(nb::class_<PyAgent>& agent) {
  agent
      .def(
          "listen_tcp",
          [](PyAgent& self, const std::string& host, int port, Context tls) {
            int bound = 0;
            checked([&] { return self.agent->listen_tcp(host, port, tls, &bound); });
            return bound;
          },
          "host"_a, "port"_a, "tls"_a.none() = nb::none(),
          "Accept connections; port 0 takes a free one. Returns the port.")
      .def(
          "listen_unix",
          [](PyAgent& self, const std::string& path) {
            checked([&] { return self.agent->listen_unix(path); });
          },
          "path"_a, "Accept connections of this host; the socket file is made 0600.")
      .def(
          "dial_tcp",
          [](PyAgent& self, const std::string& host, int port, Context tls, double timeout_s) {
            uint64_t id = 0;
            checked([&] { return self.agent->dial_tcp(host, port, tls, timeout_s, &id); });
            return id;
          },
          "host"_a, "port"_a, "tls"_a.none(), "timeout_s"_a,
          "Begin to connect; an event tells how it went. Returns the connection.")
      .def(
          "dial_unix",
          [](PyAgent& self, const std::string& path, double timeout_s) {
            uint64_t id = 0;
            checked([&] { return self.agent->dial_unix(path, timeout_s, &id); });
            return id;
          },
          "path"_a, "timeout_s"_a,
          "Begin to connect; an event tells how it went. Returns the connection.")
      .def_static(
          "pair",
          [](PyAgent& one, PyAgent& other) {
            uint64_t ours = 0;
            uint64_t theirs = 0;
            checked([&] { return Agent::pair(*one.agent, *other.agent, &ours, &theirs); });
            return std::pair(ours, theirs);
          },
          "one"_a, "other"_a, "Connect two agents of this process. Returns both ends.")
      .def(
          "approve",
          [](PyAgent& self, uint64_t connection, uint64_t peer) {
            checked([&] { return self.agent->approve(connection, peer); });
          },
          "connection"_a, "peer"_a,
          "Let a greeted connection carry everything, on behalf of `peer` (not 0).")
      .def(
          "drop",
          [](PyAgent& self, uint64_t connection, const std::string& reason) {
            checked([&] { return self.agent->drop(connection, reason); });
          },
          "connection"_a, "reason"_a, "End a connection and what runs over it.");
}

void bind_payloads(nb::class_<PyAgent>& agent) {
  const auto sender = [](Status (Agent::*send)(uint64_t, std::span<const uint8_t>)) {
    return [send](PyAgent& self, uint64_t connection, const Payload& payload) {
      const auto bytes = view(payload);
      checked([&] { return (self.agent.get()->*send)(connection, bytes); });
    };
  };
  agent
      .def("send_greeting", sender(&Agent::send_greeting), "connection"_a, "payload"_a,
           "Send before the connection is approved.")
      .def("send_message", sender(&Agent::send_message), "connection"_a, "payload"_a,
           "Send a control message.")
      .def("send_note", sender(&Agent::send_note), "connection"_a, "payload"_a,
           "Send a notification.")
      .def("next_events", &next_events, "max"_a, "timeout_s"_a,
           "Wait without the GIL for (kind, connection, peer, id, payload); see agent.h. One "
           "thread reads them.")
      .def(
          "wake", [](PyAgent& self) { self.agent->wake(); },
          "Make one `next_events` return at once.")
      .def(
          "close",
          [](PyAgent& self, double timeout_s) {
            nb::gil_scoped_release release;
            const AgentCloseReport report = self.agent->close(timeout_s);
            return std::tuple(report.cancelled_jobs, report.abandoned_jobs, report.abandoned_bytes);
          },
          "timeout_s"_a,
          "Refuse what is new, give transfers half of the time to end, and cancel the others. "
          "Returns (cancelled jobs, abandoned jobs, abandoned bytes).")
      .def_prop_ro(
          "is_closed", [](const PyAgent& self) { return self.agent->is_closed(); },
          "Whether `close` was called.");
}

}  // namespace

void bind_agent(nb::module_& module) {
  nb::class_<PyAgent> agent(module, "LinkAgent",
                            "The endpoint of this process: registered memory, leases, connections "
                            "and transfers. Thread-safe; close it, with a bound.");
  agent.def("__init__", &create, nb::kw_only(), "io_threads"_a = 1, "copy_threads"_a = 0,
            "greeting_s"_a = 5.0, "greetings_max"_a = 64, "ping_s"_a = 1.0,
            "piece_bytes"_a = 1 << 20, "cancel_grace_s"_a = 0.1, "See AgentOptions in agent.h.");
  bind_connections(agent);
  bind_payloads(agent);
  bind_agent_memory(agent);
  bind_agent_sharing(module, agent);
  bind_agent_reports(agent);
  bind_submission(module, agent);
}

}  // namespace kvx::bind
