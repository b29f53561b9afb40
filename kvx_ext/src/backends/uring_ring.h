// The io_uring system calls and the two rings they share with the kernel, without liburing.
//
// One thread prepares, enters and reaps; it must be the one that called enable(). Kernels that
// offer SINGLE_ISSUER and DEFER_TASKRUN then complete requests only inside enter(), on that thread,
// instead of interrupting whatever it does.
#pragma once

#include <linux/io_uring.h>

#include <cstdint>
#include <memory>
#include <span>

#include "kvx/status.h"

namespace kvx {

class UringRing {
 public:
  // `entries` is rounded up to a power of two by the kernel.
  static Status create(uint32_t entries, std::unique_ptr<UringRing>* ring);
  ~UringRing();
  UringRing(const UringRing&) = delete;
  UringRing& operator=(const UringRing&) = delete;

  Status enable();

  // A zeroed entry that the next enter() submits; null when the submission ring is full.
  io_uring_sqe* prepare();

  // Submits what was prepared; with `wait`, sleeps until a completion is there. Returns -errno.
  int enter(bool wait);

  // Copies completions out, up to the size of `completions`; returns how many.
  size_t reap(std::span<io_uring_cqe> completions);

  // A table of `slots` registered buffers, all empty; set_buffer() with 0 bytes empties one again.
  // Both return -errno.
  int register_table(uint32_t slots);
  int set_buffer(uint32_t slot, uint8_t* base, int64_t bytes);

  // Whether the kernel implements an operation; -errno when it cannot say.
  int has_operation(uint8_t operation);

 private:
  UringRing() = default;
  Status map(const io_uring_params& params);

  int fd_ = -1;
  bool is_disabled_ = false;
  uint8_t* rings_ = nullptr;
  size_t rings_bytes_ = 0;
  io_uring_sqe* entries_ = nullptr;
  size_t entries_bytes_ = 0;

  uint32_t* submission_head_ = nullptr;
  uint32_t* submission_tail_ = nullptr;
  uint32_t submission_mask_ = 0;
  uint32_t prepared_ = 0;   // our tail, ahead of the shared one until enter()
  uint32_t published_ = 0;  // the shared tail

  uint32_t* completion_head_ = nullptr;
  uint32_t* completion_tail_ = nullptr;
  uint32_t completion_mask_ = 0;
  io_uring_cqe* completions_ = nullptr;
};

}  // namespace kvx
