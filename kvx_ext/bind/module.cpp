#include "bind.h"
#include "shim/sabotage.h"

static_assert(!kvx::kCanMakeMistakes, "only the native tests are built with KVX_SABOTAGE");

NB_MODULE(_core, module) {
  module.doc() = "Native core of kvx: memory, copies with checksums, block index and file I/O.";
  // A cache that is still open at exit is reported by ResourceWarning, with less noise.
  nanobind::set_leak_warnings(false);
  kvx::bind::bind_memory(module);
  kvx::bind::bind_checksum(module);
  kvx::bind::bind_body_copy(module);
  kvx::bind::bind_digest(module);
  kvx::bind::bind_copy_plan(module);
  kvx::bind::bind_layers(module);
  kvx::bind::bind_dlpack(module);
  kvx::bind::bind_block_index(module);
  kvx::bind::bind_failpoint(module);
  kvx::bind::bind_device(module);
  kvx::bind::bind_copies(module);
  kvx::bind::bind_kernels(module);
  kvx::bind::bind_engine(module);
  kvx::bind::bind_remote(module);
  kvx::bind::bind_agent(module);
}
