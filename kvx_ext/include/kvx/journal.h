// A decorator that writes down every write and sync in a file, data included, so that a test can
// build any image a power cut could have left behind (tests/sim/journal.py does).
//
// The file is "KVXJRNL1" followed by records, all little-endian, 48 bytes each:
//
//   offset size
//   0      1    type: 1 submitted, 2 completed, 3 end of a journal that was closed in order
//   1      1    kind: 1 write, 2 sync (IoKind)
//   2      2    0
//   4      4    code (kvx::Code) of a completion, else 0
//   8      8    sequence: number of the request, from 0, in order of submission
//   16     8    device of the file (st_dev)
//   24     8    inode of the file (st_ino)
//   32     8    offset in the file, bytes
//   40     8    bytes written; that many bytes of data follow a submitted write
//
// "submitted" is recorded before the inner backend sees the request, "completed" before the sink
// does, so what the caller did because of a completion stands behind it. Of a completion only the
// type, kind, code and sequence count. A record cut off at the end is the mark of a killed process.
#pragma once

#include <memory>
#include <string>

#include "kvx/backend.h"

namespace kvx {

// Truncates `path`. submit() writes the data into the page cache on the caller's thread: for tests
// only. kStorage: the journal cannot be created.
Status make_journaled(const BackendFactory& inner, const std::string& path, IoSink sink,
                      std::unique_ptr<IoBackend>* backend);

}  // namespace kvx
