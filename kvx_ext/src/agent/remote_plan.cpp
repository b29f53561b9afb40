#include <limits>
#include <string>

#include "kvx/agent.h"
#include "kvx/checksum.h"

namespace kvx {

Status finish_plan(RemotePlan* plan, int64_t region_bytes) {
  const size_t blocks = plan->local.size();
  if (blocks == 0) return {Code::kUsage, "a transfer needs blocks"};
  // How large the remote region is only its owner can tell, and it checks.
  constexpr int64_t kUnknownBytes = std::numeric_limits<int64_t>::max();
  Status status = validate(plan->local, region_bytes);
  if (status.ok()) status = validate(plan->remote, kUnknownBytes);
  if (status.ok()) status = validate_fit(plan->local, plan->remote);
  if (!status.ok()) return status;
  auto check_count = [&](size_t entries, size_t wanted, const char* what) -> Status {
    if (entries == 0 || entries == wanted) return Status::Ok();
    return {Code::kUsage, std::to_string(entries) + " " + what + " for " + std::to_string(blocks) +
                              " blocks, not " + std::to_string(wanted)};
  };
  status = check_count(plan->indices.size(), blocks, "indices");
  if (status.ok()) status = check_count(plan->checksums.size(), blocks, "checksums");
  if (status.ok()) status = check_count(plan->keys.size(), blocks * kKeyBytes, "bytes of keys");
  if (!status.ok()) return status;
  int64_t total_bytes = 0;
  for (const Descriptor& block : plan->local) {
    if (__builtin_add_overflow(total_bytes, block.total(), &total_bytes)) {
      return {Code::kUsage, "the transfer has more bytes than can be counted"};
    }
  }
  plan->total_bytes = total_bytes;
  return Status::Ok();
}

}  // namespace kvx
