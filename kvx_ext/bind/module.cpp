#include "bind.h"

NB_MODULE(_core, module) {
  module.doc() = "Native core of kvx: memory, copies with checksums, block index and file I/O.";
  kvx::bind::bind_memory(module);
  kvx::bind::bind_checksum(module);
  kvx::bind::bind_digest(module);
  kvx::bind::bind_block_index(module);
  kvx::bind::bind_failpoint(module);
  kvx::bind::bind_engine(module);
}
