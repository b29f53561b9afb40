// What backends that move bytes themselves need of the agent: opaque regions, work under leases of
// ours, and a sight of the peer's.
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>

#include <tuple>

#include "agent.h"
#include "kvx/peer_sight.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace kvx::bind {

namespace {

using Reference = std::tuple<uint64_t, uint32_t, uint64_t>;

// Letting go of the use may wake whoever revokes: never under the GIL.
struct PyLeaseUse {
  std::shared_ptr<LeaseHold> hold;

  explicit PyLeaseUse(std::shared_ptr<LeaseHold> made) : hold(std::move(made)) {}
  PyLeaseUse(PyLeaseUse&&) noexcept = default;
  PyLeaseUse& operator=(PyLeaseUse&&) noexcept = default;
  ~PyLeaseUse() { end(); }

  void end() {
    if (hold == nullptr) return;
    nb::gil_scoped_release release;
    hold.reset();
  }

  const Lease& open() const {
    if (hold == nullptr) raise_if_error({Code::kUsage, "the use of the lease was ended"});
    return **hold;
  }
};

struct PySight {
  std::shared_ptr<const PeerSight> native;
};

PyLeaseUse use_lease(PyAgent& self, const Reference& lease, uint64_t peer, int rights) {
  const LeaseRef ref{std::get<0>(lease), std::get<1>(lease), std::get<2>(lease)};
  std::shared_ptr<LeaseHold> hold;
  raise_if_error(self.agent->use_lease(ref, peer, static_cast<uint8_t>(rights), &hold));
  return PyLeaseUse(std::move(hold));
}

nb::ndarray<nb::numpy, int64_t, nb::ndim<2>> blocks_leased(const PyLeaseUse& self) {
  const std::vector<Descriptor>& blocks = self.open().terms.blocks;
  std::vector<int64_t> cells;
  cells.reserve(blocks.size() * 4);
  for (const Descriptor& block : blocks) {
    cells.insert(cells.end(), {block.offset, block.stride, block.count, block.bytes});
  }
  return adopt<int64_t, 2>(std::move(cells), {blocks.size(), 4});
}

PySight sight(const PyAgent& self, uint64_t peer) {
  PySight made;
  raise_if_error(self.agent->sight(peer, &made.native));
  return made;
}

}  // namespace

void bind_agent_sharing(nb::module_& module, nb::class_<PyAgent>& agent) {
  nb::class_<PyLeaseUse>(module, "LeaseUse",
                         "Work of a peer under a live lease of this agent; until `end`, or the "
                         "last reference, revoking the lease waits.")
      .def_prop_ro(
          "region", [](const PyLeaseUse& self) { return self.open().region->id(); },
          "Number of the leased region.")
      .def_prop_ro("blocks", &blocks_leased, nb::rv_policy::move,
                   "The leased blocks, (n, 4) int64 rows of offset, stride, count and bytes.")
      .def_prop_ro(
          "is_range", [](const PyLeaseUse& self) { return self.open().is_range(); },
          "Whether it is one run of bytes, of which any part may be named.")
      .def(
          "is_live",
          [](const PyLeaseUse& self) { return self.hold != nullptr && self.hold->is_live(); },
          "Whether the lease has neither been revoked nor expired.")
      .def("end", &PyLeaseUse::end, "Say that the peer is through, or gone.");
  nb::class_<PySight>(module, "PeerSight",
                      "What can be seen of a peer on this host, also after it is gone.")
      .def(
          "look",
          [](const PySight& self, uint32_t slot, uint64_t generation) {
            return static_cast<int>(self.native->look(slot, generation));
          },
          "slot"_a, "generation"_a,
          "kvx::Code: 0, 7 when that lease of the peer has ended, 12 when its process has.");
  agent
      .def(
          "add_opaque_region",
          [](PyAgent& self, int64_t bytes) {
            uint32_t id = 0;
            raise_if_error(self.agent->add_opaque_region(bytes, &id));
            return id;
          },
          "bytes"_a,
          "Let memory be leased that only a backend of its own can touch. Returns the region, "
          "numbered from 1 << 31 on.")
      .def("use_lease", &use_lease, "lease"_a, "peer"_a, "rights"_a,
           "Begin work of `peer` under a lease (id, slot, generation) of this agent that needs "
           "these rights. Raises StaleReference when it has ended, UsageError when it is not for "
           "that.")
      .def("sight", &sight, "peer"_a,
           "A sight of a peer on this host. Raises UnavailableError when it is not connected over "
           "a unix socket.");
}

}  // namespace kvx::bind
