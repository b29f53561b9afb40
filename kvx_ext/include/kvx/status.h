// The outcome of a native call: a code, the errno behind it, and a sentence for people.
//
// No exception crosses the data path; every fallible function returns a Status, and ignoring one
// does not compile. bind/status.cpp is the only place that turns a Status into a Python exception.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace kvx {

// The values cross into Python as int32 (see kvx/transfer/handle.py): append, never renumber.
enum class Code : int32_t {
  kOk = 0,
  kUsage = 1,        // the caller's arguments are wrong; nothing was done
  kCapacity = 2,     // no room, and nothing may be evicted
  kUnavailable = 3,  // the kernel, device or service does not offer this here
  kStorage = 4,      // the operating system failed an I/O; see error_number()
  kShort = 5,        // fewer bytes moved than asked for
  kCorrupt = 6,      // the bytes do not match their checksum
  kStale = 7,        // the slot was reused since the reference was made
  kTimeout = 8,      // the deadline passed before the bytes had moved
  kCancelled = 9,    // cancelled, or the engine was closed
  kSkipped = 10,     // not started, because its job had already ended
  kDevice = 11,      // the GPU or its driver failed it; see error_number()
  kPeerLost = 12,    // the peer died, froze or was fenced off before the bytes had moved
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message, int error_number = 0)
      : code_(code), error_number_(error_number), message_(std::move(message)) {}

  static Status Ok() { return {}; }

  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  int error_number() const { return error_number_; }
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::kOk;
  int error_number_ = 0;
  std::string message_;
};

}  // namespace kvx
