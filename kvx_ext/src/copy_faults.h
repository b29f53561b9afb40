// Failpoints on the copy threads: what hangs there ignores cancel, as a stalled memcpy does.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>

#include "kvx/failpoint.h"

namespace kvx {

class CopyFaults : public FaultListener {
 public:
  // Must be made shared and then given to failpoints->listen().
  explicit CopyFaults(std::shared_ptr<Failpoints> failpoints)
      : failpoints_(std::move(failpoints)) {}

  // Delays or hangs as the rules say; true when the block's bytes shall go wrong.
  bool strike();

  void release() override;

 private:
  const std::shared_ptr<Failpoints> failpoints_;
  std::mutex mutex_;
  std::condition_variable released_;
  int64_t releases_ = 0;  // mutex_
};

}  // namespace kvx
