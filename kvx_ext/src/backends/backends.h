// The constructors behind make_backend(), one per way of doing I/O.
#pragma once

#include <memory>

#include "kvx/backend.h"

namespace kvx {

// The largest piece of a request that is handed to the kernel at once, see uring.cpp.
inline constexpr int64_t kIoChunkBytes = int64_t{4} << 20;
// A file that keeps answering EAGAIN is broken, and retrying for ever would spin.
inline constexpr int kIoRetriesMax = 64;

Status make_uring(int queue_depth, IoSink sink, std::unique_ptr<IoBackend>* backend);
Status make_posix(int threads, IoSink sink, std::unique_ptr<IoBackend>* backend);

}  // namespace kvx
