// How an engine gets its file backend and its files: io_uring where the kernel lets it, else the
// thread pool, and a sentence that says why not.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kvx/backend.h"
#include "kvx/failpoint.h"

namespace kvx {

enum class BackendKind : uint8_t { kAuto, kUring, kPosix };

struct BackendOptions {
  int queue_depth = 64;  // io_uring: operations in the kernel at once; the rest waits inside
  int threads = 4;       // posix: operations in the kernel at once
  // Outermost first: failpoints, then the journal, then the real backend. The journal therefore
  // records what reached the real backend, torn writes and all.
  std::shared_ptr<Failpoints> failpoints;  // none: no faults
  std::string journal_path;                // empty: no journal
};

// kAuto falls back to posix and explains that in `why_not_uring` (left empty otherwise; may be
// null). kUring fails with the same explanation, kUnavailable.
Status make_backend(BackendKind kind, const BackendOptions& options, IoSink sink,
                    std::unique_ptr<IoBackend>* backend, std::string* why_not_uring);

// Ok when io_uring works here with everything the backend uses, else kUnavailable and why.
Status probe_io_uring();

struct OpenFlags {
  bool create = false;
  bool direct = false;     // O_DIRECT where the file system offers it, see `is_direct`
  bool exclusive = false;  // with create: fail with EEXIST when the file is there
};

// Opens for reading and writing, mode 0600, close-on-exec. A file system that refuses O_DIRECT
// (EINVAL) gives a buffered file and `*is_direct == false`; anything else is kStorage.
Status open_file(const std::string& path, const OpenFlags& flags, int* fd, bool* is_direct);

// Reserves [offset, offset + bytes) so that later writes cannot meet ENOSPC; the file grows if it
// must. On ENOSPC the file keeps its size and old content. A file system without fallocate gets the
// size only, and reports kUnavailable.
Status preallocate(int fd, int64_t offset, int64_t bytes);

}  // namespace kvx
