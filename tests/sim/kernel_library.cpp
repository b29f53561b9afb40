// The kernels behind a C interface for tests/sim/kernels.py: buffers at made-up device addresses,
// and the first access outside of them.
#include <cstring>

#include "cuda/kernels.h"

namespace {

struct Buffer {
  uint64_t address;
  uint8_t* memory;
  uint64_t bytes;
  uint64_t is_writable;
};

struct Refusal {
  uint64_t address;
  uint64_t bytes;
  uint64_t is_write;
};

class BufferAccess : public kvx::sim::MemoryAccess {
 public:
  BufferAccess(const Buffer* buffers, uint64_t count, Refusal* refusal)
      : buffers_(buffers), count_(count), refusal_(refusal) {}

  uint8_t* resolve(uint64_t address, size_t bytes, bool is_write) override {
    for (const Buffer* buffer = buffers_; buffer != buffers_ + count_; ++buffer) {
      const uint64_t at = address - buffer->address;
      const bool is_inside = at < buffer->bytes && bytes <= buffer->bytes - at;
      if (is_inside && (!is_write || buffer->is_writable != 0)) return buffer->memory + at;
    }
    *refusal_ = {address, bytes, is_write ? uint64_t{1} : 0};
    return nullptr;
  }

 private:
  const Buffer* buffers_;
  uint64_t count_;
  Refusal* refusal_;
};

}  // namespace

#define KVX_EXPORT extern "C" __attribute__((visibility("default")))

// The name of a kernel by its number; null behind the last.
KVX_EXPORT const char* kvx_sim_kernel_name(uint64_t index) {
  const auto names = kvx::sim::kernel_names();
  return index < names.size() ? names[index].data() : nullptr;
}

// Writes at most `room` sizes and returns how many there are.
KVX_EXPORT uint64_t kvx_sim_parameter_bytes(const char* name, uint64_t* sizes, uint64_t room) {
  const auto bytes = kvx::sim::kernel_parameter_bytes(name);
  for (uint64_t i = 0; i < bytes.size() && i < room; ++i) sizes[i] = bytes[i];
  return bytes.size();
}

// 1 when every thread ran, 0 when an access was refused: `refusal` says which.
KVX_EXPORT int kvx_sim_run(const char* name, const unsigned* grid, const unsigned* block,
                           void** parameters, const Buffer* buffers, uint64_t count,
                           Refusal* refusal) {
  BufferAccess access(buffers, count, refusal);
  return kvx::sim::run_kernel(name, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                              parameters, access)
             ? 1
             : 0;
}
