// The kernels that checksum.cpp chooses among. Each x86 one is compiled in a file of its own with
// that instruction set switched on; REQUIRES of all: the CPU has it.
#pragma once

#include "kvx/checksum.h"

namespace kvx::crc64 {

extern const ChecksumKernel kPortableKernel;
extern const ChecksumKernel kPclmul128Kernel;
extern const ChecksumKernel kVpclmul256Kernel;
extern const ChecksumKernel kVpclmul512Kernel;

}  // namespace kvx::crc64
