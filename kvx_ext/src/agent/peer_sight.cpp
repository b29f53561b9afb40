#include "kvx/peer_sight.h"

#include "shim/fence.h"

namespace kvx {

Code PeerSight::look(uint32_t slot, uint64_t generation) const {
  fence_loads();
  if (!is_there_()) return Code::kPeerLost;
  return leases_->is_live(slot, generation) ? Code::kOk : Code::kStale;
}

}  // namespace kvx
