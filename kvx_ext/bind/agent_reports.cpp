#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "agent.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

nb::typed<nb::dict, nb::str, nb::object> info(const PyAgent& self, uint64_t connection) {
  ConnectionInfo found;
  Status status;
  {
    nb::gil_scoped_release release;
    status = self.agent->info(connection, &found);
  }
  raise_if_error(status);
  nb::typed<nb::dict, nb::str, nb::object> fields;
  fields["peer"] = found.peer;
  fields["is_unix"] = found.is_unix;
  fields["is_dialled"] = found.is_dialled;
  fields["is_encrypted"] = found.is_encrypted;
  fields["address"] = found.address;
  fields["pid"] = found.pid;
  fields["uid"] = found.uid;
  fields["heard_ago_s"] = found.heard_ago_s;
  fields["answered_ago_s"] = found.answered_ago_s;
  fields["unacknowledged"] = found.unacknowledged;
  fields["retransmits"] = found.retransmits;
  fields["bytes_in"] = found.bytes_in;
  fields["bytes_out"] = found.bytes_out;
  fields["queued_bytes"] = found.queued_bytes;
  return fields;
}

nb::typed<nb::dict, nb::str, int64_t> stats(const PyAgent& self) {
  AgentStats seen;
  {
    nb::gil_scoped_release release;
    seen = self.agent->stats();
  }
  nb::typed<nb::dict, nb::str, int64_t> fields;
  fields["connections"] = seen.connections;
  fields["regions"] = seen.regions;
  fields["region_bytes"] = seen.region_bytes;
  fields["leases"] = seen.leases;
  fields["lease_bytes"] = seen.lease_bytes;
  fields["running"] = seen.running;
  fields["served"] = seen.served;
  fields["quarantined"] = seen.quarantined;
  fields["quarantined_bytes"] = seen.quarantined_bytes;
  fields["reads"] = seen.reads;
  fields["writes"] = seen.writes;
  fields["failed"] = seen.failed;
  fields["timed_out"] = seen.timed_out;
  fields["cancelled"] = seen.cancelled;
  fields["bytes_read"] = seen.bytes_read;
  fields["bytes_written"] = seen.bytes_written;
  fields["bytes_served"] = seen.bytes_served;
  fields["corrupt_blocks"] = seen.corrupt_blocks;
  fields["stale_blocks"] = seen.stale_blocks;
  fields["refused_requests"] = seen.refused_requests;
  fields["malformed_frames"] = seen.malformed_frames;
  fields["late_pieces"] = seen.late_pieces;
  fields["dropped_events"] = seen.dropped_events;
  return fields;
}

}  // namespace

void bind_agent_reports(nb::class_<PyAgent>& agent) {
  agent
      .def("info", &info, "connection"_a,
           "What is known of a connection, by the names of ConnectionInfo in agent.h.")
      .def("stats", &stats, "Counters and gauges, by the names of AgentStats in agent.h.")
      .def(
          "quarantine",
          [](const PyAgent& self) {
            std::vector<std::tuple<uint64_t, uint64_t, bool, int64_t, double>> rows;
            for (const Quarantined& one : self.agent->quarantine()) {
              rows.emplace_back(one.id, one.peer, one.is_write, one.bytes, one.since_s);
            }
            return rows;
          },
          "Transfers that ended while their bytes may still move: (id, peer, is_write, bytes, "
          "seconds since).");
}

}  // namespace kvx::bind
