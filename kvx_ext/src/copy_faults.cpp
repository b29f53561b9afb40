#include "copy_faults.h"

#include "clock.h"

namespace kvx {

bool CopyFaults::strike() {
  std::unique_lock lock(mutex_);
  // Before the rules are asked, so that a clear() in between is not missed.
  const int64_t releases = releases_;
  lock.unlock();
  const std::optional<Fault> fault = failpoints_->next_copy();
  if (!fault.has_value()) return false;
  if (fault->rule.action == FaultAction::kFlip) return true;
  const bool is_hang = fault->rule.action == FaultAction::kHang;
  lock.lock();
  released_.wait_until(lock, time_after(is_hang ? kForeverS : fault->rule.delay_s),
                       [&] { return releases_ != releases; });
  return false;
}

void CopyFaults::release() {
  std::lock_guard lock(mutex_);
  ++releases_;
  released_.notify_all();
}

}  // namespace kvx
