// What can be seen of a peer on this host: whether a lease of it is live, and it itself.
//
// For whoever copies out of a peer's memory without the agent: it looks before the copy begins, and
// again once the copy has ended and before what it brought is used. A page that a dead process left
// behind says that its leases are live, so the process is looked at, too.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "kvx/lease_table.h"
#include "kvx/status.h"

namespace kvx {

// Thread-safe, and usable after the peer or the agent is gone.
class PeerSight {
 public:
  PeerSight(std::shared_ptr<const LeaseView> leases, std::function<bool()> is_there)
      : leases_(std::move(leases)), is_there_(std::move(is_there)) {}

  // kOk; kPeerLost: its process has exited; kStale: the lease has ended. No load of memory that the
  // caller has copied before can come after it.
  Code look(uint32_t slot, uint64_t generation) const;

 private:
  const std::shared_ptr<const LeaseView> leases_;
  const std::function<bool()> is_there_;
};

}  // namespace kvx
