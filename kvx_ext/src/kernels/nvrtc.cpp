#include "kernels/nvrtc.h"

#include <dlfcn.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvx {

// Destroys the program on every way out.
class Nvrtc::Compilation {
 public:
  explicit Compilation(const Nvrtc& nvrtc) : nvrtc_(nvrtc) {}
  ~Compilation() {
    if (program != nullptr) nvrtc_.destroy_(&program);
  }

  Compilation(const Compilation&) = delete;
  Compilation& operator=(const Compilation&) = delete;

  Status failed(const std::string& what, Result result) const {
    std::string message = "NVRTC " + nvrtc_.version() + ": " + what + ": ";
    message += nvrtc_.error_string_(result);
    size_t bytes = 0;
    if (program != nullptr && nvrtc_.log_bytes_(program, &bytes) == 0 && bytes > 1) {
      std::string log(bytes, '\0');
      if (nvrtc_.log_(program, log.data()) == 0) message += "\n" + std::string(log.c_str());
    }
    return {Code::kUnavailable, message};
  }

  Status take(Result (*size)(Program, size_t*), Result (*get)(Program, char*),
              std::string* image) const {
    size_t bytes = 0;
    Result result = size(program, &bytes);
    if (result != 0) return failed("size of the result", result);
    image->resize(bytes);
    result = get(program, image->data());
    return result == 0 ? Status::Ok() : failed("the result", result);
  }

  Program program = nullptr;

 private:
  const Nvrtc& nvrtc_;
};

Status Nvrtc::load(const std::string& name, std::unique_ptr<Nvrtc>* nvrtc) {
  std::unique_ptr<Nvrtc> made(new Nvrtc());
  made->library_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (made->library_ == nullptr) {
    const char* why = dlerror();
    return {Code::kUnavailable, why != nullptr ? why : name + ": unknown error"};
  }
  Status status = made->resolve(name);
  if (status.ok()) *nvrtc = std::move(made);
  return status;
}

Nvrtc::~Nvrtc() {
  if (library_ != nullptr) dlclose(library_);
}

Status Nvrtc::resolve(const std::string& name) {
  std::string missing;
  const auto find = [&](const char* symbol, auto* function) {
    void* found = dlsym(library_, symbol);
    if (found == nullptr) missing = symbol;
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(found);
  };
  find("nvrtcVersion", &version_);
  find("nvrtcGetErrorString", &error_string_);
  find("nvrtcGetNumSupportedArchs", &architecture_count_);
  find("nvrtcGetSupportedArchs", &architectures_);
  find("nvrtcCreateProgram", &create_);
  find("nvrtcDestroyProgram", &destroy_);
  find("nvrtcCompileProgram", &compile_);
  find("nvrtcGetProgramLogSize", &log_bytes_);
  find("nvrtcGetProgramLog", &log_);
  find("nvrtcGetCUBINSize", &cubin_bytes_);
  find("nvrtcGetCUBIN", &cubin_);
  find("nvrtcGetPTXSize", &ptx_bytes_);
  find("nvrtcGetPTX", &ptx_);
  if (missing.empty()) return Status::Ok();
  return {Code::kUnavailable, name + " has no " + missing + "; it is too old, or no NVRTC"};
}

std::string Nvrtc::version() const {
  int major = 0;
  int minor = 0;
  if (version_(&major, &minor) != 0) return "of unknown version";
  return std::to_string(major) + "." + std::to_string(minor);
}

int Nvrtc::architecture_for(int wanted) const {
  int count = 0;
  if (architecture_count_(&count) != 0 || count < 1) return 0;
  std::vector<int> known(static_cast<size_t>(count));
  if (architectures_(known.data()) != 0) return 0;
  int best = 0;
  for (int architecture : known) {
    if (architecture <= wanted) best = std::max(best, architecture);
  }
  return best;
}

Status Nvrtc::compile(std::string_view source, int compute_major, int compute_minor,
                      std::string* image) {
  const int wanted = compute_major * 10 + compute_minor;
  const int architecture = architecture_for(wanted);
  if (architecture == 0) {
    return {Code::kUnavailable, "NVRTC " + version() + " has no architecture up to " +
                                    std::to_string(wanted) + ", which the GPU needs"};
  }
  const bool is_exact = architecture == wanted;
  const std::string target = std::string("--gpu-architecture=") + (is_exact ? "sm_" : "compute_") +
                             std::to_string(architecture);
  // As embed.cmake has nvcc do it.
  const std::array options = {target.c_str(), "--std=c++17", "--fmad=false"};
  Compilation compilation(*this);
  const std::string text(source);
  Result result =
      create_(&compilation.program, text.c_str(), "kvx_kernels.cu", 0, nullptr, nullptr);
  if (result != 0) return compilation.failed("nvrtcCreateProgram", result);
  result = compile_(compilation.program, static_cast<int>(options.size()), options.data());
  if (result != 0) return compilation.failed("compiling for " + target, result);
  return is_exact ? compilation.take(cubin_bytes_, cubin_, image)
                  : compilation.take(ptx_bytes_, ptx_, image);
}

}  // namespace kvx
