// Declarations of all entry points, exported under their own names, from the list that kvx has.
#pragma once

#include "shim/cuda/abi.h"

#define KVX_SIM_EXPORT [[gnu::visibility("default")]]

namespace kvx::sim {

// C linkage: the namespace is for the types of the parameters only.
using namespace kvx::cuda;

extern "C" {
#define KVX_SIM_DECLARE(member, symbol, parameters) KVX_SIM_EXPORT Result symbol parameters;
KVX_CUDA_REQUIRED(KVX_SIM_DECLARE)
KVX_CUDA_OPTIONAL(KVX_SIM_DECLARE)
#undef KVX_SIM_DECLARE

// The form of CUDA 13: without the index of the copy that failed.
KVX_SIM_EXPORT Result cuMemcpyBatchAsync_v2(DevicePointer* targets, DevicePointer* sources,
                                            size_t* bytes, size_t count,
                                            MemcpyAttributes* attributes, size_t* attribute_starts,
                                            size_t attribute_count, Stream stream);
KVX_SIM_EXPORT Result cuGetProcAddress_v2(const char* symbol, void** function, int version,
                                          uint64_t flags, int* symbol_status);
}

// The name a real library exports for the newest form of an entry point. In the file that defines
// it: an alias is resolved by the assembler.
#define KVX_SIM_ALIAS(alias_name, symbol) \
  extern "C" KVX_SIM_EXPORT decltype(symbol) alias_name __attribute__((alias(#symbol)));

}  // namespace kvx::sim
