// CUDA's run-time compiler, where the user's machine has it: dlopen, no build or link dependency.
// It makes the kernels for a GPU that the build had no nvcc for.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "kvx/status.h"

namespace kvx {

class Nvrtc {
 public:
  // What the library is called, newest first. 13 knows more GPUs; what it compiles, a driver of 12
  // may refuse.
  static constexpr std::array kNames = {"libnvrtc.so.13", "libnvrtc.so.12"};

  // Opens a library by its name or path. kUnavailable where there is none or it lacks an entry
  // point.
  static Status load(const std::string& name, std::unique_ptr<Nvrtc>* nvrtc);
  ~Nvrtc();

  Nvrtc(const Nvrtc&) = delete;
  Nvrtc& operator=(const Nvrtc&) = delete;

  // Compiles for one compute capability: a cubin where the compiler knows it, else PTX of the
  // newest that it knows below. `image` is what cuModuleLoadData takes. May take seconds.
  // kUnavailable, with the compiler's log, where it fails.
  Status compile(std::string_view source, int compute_major, int compute_minor, std::string* image);

  // Of the library, e.g. "13.0".
  std::string version() const;

 private:
  using Result = int;                       // nvrtcResult
  using Program = struct NvrtcProgramTag*;  // nvrtcProgram
  class Compilation;

  Nvrtc() = default;
  Status resolve(const std::string& name);
  // The newest architecture that is not above `wanted`, both as 10 * major + minor; 0 when none.
  int architecture_for(int wanted) const;

  void* library_ = nullptr;
  Result (*version_)(int*, int*) = nullptr;
  const char* (*error_string_)(Result) = nullptr;
  Result (*architecture_count_)(int*) = nullptr;
  Result (*architectures_)(int*) = nullptr;
  Result (*create_)(Program*, const char*, const char*, int, const char* const*,
                    const char* const*) = nullptr;
  Result (*destroy_)(Program*) = nullptr;
  Result (*compile_)(Program, int, const char* const*) = nullptr;
  Result (*log_bytes_)(Program, size_t*) = nullptr;
  Result (*log_)(Program, char*) = nullptr;
  Result (*cubin_bytes_)(Program, size_t*) = nullptr;
  Result (*cubin_)(Program, char*) = nullptr;
  Result (*ptx_bytes_)(Program, size_t*) = nullptr;
  Result (*ptx_)(Program, char*) = nullptr;
};

}  // namespace kvx
