#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include "agent.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

// False for a timeout, which is an answer; raises for what else went wrong.
bool has_ended(const Status& status) {
  if (status.code() == Code::kTimeout) return false;
  raise_if_error(status);
  return true;
}

std::tuple<uint64_t, uint32_t, uint64_t> grant(PyAgent& self, uint32_t region, const Blocks& blocks,
                                               int rights, uint64_t peer, double ttl_s,
                                               const std::optional<Row<uint64_t>>& checksums,
                                               const std::optional<BlockKeys>& keys) {
  LeaseTerms terms{.rights = static_cast<uint8_t>(rights),
                   .peer = peer,
                   .ttl_s = ttl_s,
                   .blocks = blocks_of(blocks),
                   .checksums = copied(checksums),
                   .keys = copied(keys)};
  LeaseRef ref;
  Status status;
  {
    nb::gil_scoped_release release;
    status = self.agent->grant(region, std::move(terms), &ref);
  }
  raise_if_error(status);
  return {ref.id, ref.slot, ref.generation};
}

}  // namespace

void bind_agent_memory(nb::class_<PyAgent>& agent) {
  agent
      .def(
          "add_region",
          [](PyAgent& self, uintptr_t address, int64_t bytes, int fd, int64_t fd_offset) {
            uint32_t id = 0;
            Status status;
            {
              nb::gil_scoped_release release;
              status = self.agent->add_region(reinterpret_cast<uint8_t*>(address), bytes, fd,
                                              fd_offset, &id);
            }
            raise_if_error(status);
            return id;
          },
          "address"_a, "bytes"_a, "fd"_a = -1, "fd_offset"_a = 0,
          "Let transfers touch memory. `fd`: the memfd it is mapped from, which is sealed: peers "
          "map it, and only this process ever writes it. Returns the region.")
      .def(
          "remove_region",
          [](PyAgent& self, uint32_t region, double timeout_s) {
            Status status;
            {
              nb::gil_scoped_release release;
              status = self.agent->remove_region(region, timeout_s);
            }
            return has_ended(status);
          },
          "region"_a, "timeout_s"_a,
          "Refuse new uses and wait for the others. False: still in use; call again.")
      .def("grant", &grant, "region"_a, "blocks"_a.noconvert(), nb::kw_only(), "rights"_a, "peer"_a,
           "ttl_s"_a, "checksums"_a.none() = nb::none(), "keys"_a.none() = nb::none(),
           "Lease blocks, (n, 4) int64 rows of offset, stride, count and bytes, to a peer (0: any) "
           "for reading (1), writing (2) or both (3). Returns (id, slot, generation).")
      .def(
          "revoke",
          [](PyAgent& self, uint64_t lease, double timeout_s) {
            Status status;
            {
              nb::gil_scoped_release release;
              status = self.agent->revoke(lease, timeout_s);
            }
            return has_ended(status);
          },
          "lease"_a, "timeout_s"_a,
          "End a lease and wait for what is under way. False: that goes on; call again.")
      .def(
          "renew",
          [](PyAgent& self, uint64_t lease, double ttl_s) {
            raise_if_error(self.agent->renew(lease, ttl_s));
          },
          "lease"_a, "ttl_s"_a, "Let a lease last until `ttl_s` from now.")
      .def(
          "can_pull",
          [](const PyAgent& self, uint64_t peer, uint32_t region, double timeout_s) {
            nb::gil_scoped_release release;
            return self.agent->can_pull(peer, region, timeout_s).message();
          },
          "peer"_a, "region"_a, "timeout_s"_a = 0.0,
          "Empty when the peer's region can be copied on this host, else why not. Waits that long "
          "for the peer to announce it.");
}

}  // namespace kvx::bind
