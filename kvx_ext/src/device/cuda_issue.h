// Hands the calls of a copy plan to the driver.
#pragma once

#include <cstddef>

#include "device/cuda_context.h"
#include "kvx/copy_plan.h"
#include "kvx/device.h"

namespace kvx {

// One lane's way into the driver; used by one thread.
class CudaIssuer {
 public:
  CudaIssuer(CudaContext& context, CopyDirection direction, cuda::Stream stream)
      : context_(context),
        direction_(direction),
        stream_(stream),
        has_batch_(context.api().memcpy_batch_async != nullptr) {}

  // False where the driver has no batch copies, or said so when it was asked for one.
  bool has_batch() const { return has_batch_; }

  // Enqueues one call that is not kStaged, and counts it. `source_order` is for batches. The driver
  // takes the arrays of `runs` as they are, but does not change them. REQUIRES: the context is
  // current. After an error some of the runs may be under way.
  cuda::Result issue(const CopyCall& call, int source_order, CopyRuns* runs, CopyStats* stats);

 private:
  cuda::Result issue_batch(const CopyCall& call, int source_order, CopyRuns* runs);
  cuda::Result issue_rows(const CopyCall& call, const CopyRuns& runs);
  cuda::Result issue_singles(const CopyCall& call, const CopyRuns& runs);

  CudaContext& context_;
  const CopyDirection direction_;
  const cuda::Stream stream_;
  bool has_batch_;
};

}  // namespace kvx
