// The constructors behind make_backend(), one per way of doing I/O.
#pragma once

#include <memory>

#include "kvx/backend.h"

namespace kvx {

// The largest piece of a request that is handed to the kernel at once. Measured with 16 and 64 MiB
// requests, O_DIRECT on ext4 over virtio: 1, 2, 4 MiB and whole all read 2.3 and write 3.2 GB/s and
// cost 0.0045, 0.0024, 0.0014 and 0.0013 CPU s/GB. So cutting gains no speed, but at 4 MiB costs
// nothing either, and a cancel or close takes hold after at most that much.
inline constexpr int64_t kIoChunkBytes = int64_t{4} << 20;
// A file that keeps answering EAGAIN is broken, and retrying for ever would spin.
inline constexpr int kIoRetriesMax = 64;

Status make_uring(int queue_depth, IoSink sink, std::unique_ptr<IoBackend>* backend);
Status make_posix(int threads, IoSink sink, std::unique_ptr<IoBackend>* backend);

}  // namespace kvx
