// One way to move bytes between host memory and files. io_uring and a posix thread pool are the
// two real ones; failpoints and the write journal wrap either, so every test runs on both.
//
// The contract that the same tests check on every backend:
//  - submit() never waits for the device, and every request gets exactly one completion, also
//    after cancel() and close(). Until then its buffer belongs to the backend.
//  - A request moves all its bytes or fails: short transfers are continued inside, a read that
//    meets the end of the file is kShort. Zero bytes complete at once, kOk.
//  - Completions come in any order on the backend's own threads, one call of the sink at a time.
//    The sink must not block and must not call back into the backend other than submit() and
//    cancel(). close() may also call it on the closing thread.
//  - Nothing orders requests but their completions: a sync covers exactly the writes to its file
//    that had completed before it was submitted.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "kvx/status.h"

namespace kvx {

enum class IoKind : uint8_t { kRead, kWrite, kSync };

struct IoRequest {
  IoKind kind = IoKind::kRead;
  int fd = -1;
  uint8_t* buffer = nullptr;  // kSync: unused
  int64_t bytes = 0;          // kSync: unused
  int64_t offset = 0;
  uint64_t token = 0;  // handed back in the completion; unique among requests in flight
};

struct IoCompletion {
  uint64_t token = 0;
  Code code = Code::kOk;
  int error_number = 0;  // behind kStorage
};

using IoSink = std::function<void(std::span<const IoCompletion>)>;

// Thread-safe, but for close(), which one thread calls once.
class IoBackend {
 public:
  // REQUIRES: close() was called, or nothing is in flight (what is would be abandoned unseen).
  virtual ~IoBackend() = default;

  virtual std::string_view name() const = 0;

  // Lets requests inside [base, base + bytes) use pre-registered pages. Failing to is no error:
  // returns why as a Status, and the requests take the ordinary path. Pins memory, so it may take
  // tenths of a second per GiB, during which completions wait. Not from the sink.
  virtual Status register_buffer(uint8_t* base, int64_t bytes) = 0;
  // REQUIRES: no request inside the range is in flight. Not from the sink.
  virtual void unregister_buffer(uint8_t* base) = 0;

  // Once close() has begun every request completes as kCancelled; after it has returned, before
  // this call returns and on the caller's thread.
  virtual void submit(std::span<const IoRequest> requests) = 0;

  // Asks that a request be given up. Its completion still comes (kCancelled if it was not too
  // late); only that completion says that the buffer is free. An unknown token is ignored.
  virtual void cancel(uint64_t token) = 0;

  // Cancels what can be cancelled and waits up to `timeout_s` for the rest; returns the number of
  // requests abandoned in the kernel. Those get no completion any more, and their buffers must
  // never be freed. REQUIRES: the caller holds no lock that the sink takes; not from the sink.
  virtual int64_t close(double timeout_s) = 0;
};

// Makes the backend that a decorator wraps, with the decorator's own sink.
using BackendFactory = std::function<Status(IoSink, std::unique_ptr<IoBackend>*)>;

}  // namespace kvx
