// One way to move bytes between host memory and files. io_uring and a posix thread pool are the
// two real ones; failpoints and the write journal wrap either, so every test runs on both.
//
// The contract that the same tests check on every backend:
//  - submit() never waits for the device, and every request gets exactly one completion, also
//    after cancel() and close(). Until then its buffer belongs to the backend.
//  - A request moves all its bytes or fails: short transfers are continued inside, a read that
//    meets the end of the file is kShort.
//  - Completions come in any order on the backend's own thread, through the sink, which must not
//    block and must not call back into the backend other than submit() and cancel().
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

#include "kvx/status.h"

namespace kvx {

enum class IoKind : uint8_t { kRead, kWrite, kSync };

struct IoRequest {
  IoKind kind = IoKind::kRead;
  int fd = -1;
  uint8_t* buffer = nullptr;  // kSync: unused
  int64_t bytes = 0;
  int64_t offset = 0;
  uint64_t token = 0;  // handed back in the completion; unique among requests in flight
};

struct IoCompletion {
  uint64_t token = 0;
  Code code = Code::kOk;
  int error_number = 0;
};

using IoSink = std::function<void(std::span<const IoCompletion>)>;

class IoBackend {
 public:
  virtual ~IoBackend() = default;

  virtual std::string_view name() const = 0;

  // Lets requests inside [base, base + bytes) use pre-registered pages. Failing to is no error:
  // returns why as a Status, and the requests take the ordinary path.
  virtual Status register_buffer(uint8_t* base, int64_t bytes) = 0;
  // REQUIRES: no request inside the range is in flight.
  virtual void unregister_buffer(uint8_t* base) = 0;

  virtual void submit(std::span<const IoRequest> requests) = 0;

  // Asks that a request be given up. Its completion still comes (kCancelled if it was not too
  // late); only that completion says that the buffer is free.
  virtual void cancel(uint64_t token) = 0;

  // Cancels what can be cancelled and waits up to `timeout_s` for the rest; returns the number of
  // requests abandoned in the kernel, whose buffers must then never be freed.
  virtual int64_t close(double timeout_s) = 0;
};

}  // namespace kvx
