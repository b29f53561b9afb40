// KernelSet and NVRTC against a driver made of a few functions. `test_kernel_set <libnvrtc>` also
// compiles the kernels with that library, no GPU needed.
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/images.h"
#include "kernels/kernel_set.h"
#include "kernels/nvrtc.h"

namespace {

using namespace kvx;

struct Launch {
  std::string name;
  unsigned ctas;
  unsigned threads;
  cuda::Stream stream;
  uint64_t first;  // of the first parameter
};

struct FakeDriver {
  std::vector<const void*> images;
  int modules = 0;
  int refused_images = 0;
  std::string missing_function;
  std::set<std::string> functions;
  std::vector<Launch> launches;
  cuda::Result launch_result = cuda::kSuccess;
};
FakeDriver driver;

cuda::Result load_module(cuda::Module* module, const void* image) {
  driver.images.push_back(image);
  if (driver.refused_images-- > 0) return cuda::kErrorNoBinaryForGpu;
  ++driver.modules;
  *module = reinterpret_cast<cuda::Module>(&driver);
  return cuda::kSuccess;
}

cuda::Result unload_module(cuda::Module) {
  --driver.modules;
  return cuda::kSuccess;
}

cuda::Result find_function(cuda::Function* function, cuda::Module, const char* name) {
  if (driver.missing_function == name) return cuda::kErrorNotFound;
  const std::string& kept = *driver.functions.insert(name).first;
  *function = reinterpret_cast<cuda::Function>(const_cast<char*>(kept.c_str()));
  return cuda::kSuccess;
}

cuda::Result name_error(cuda::Result, const char** name) {
  *name = "CUDA_ERROR_OF_TEST";
  return cuda::kSuccess;
}

cuda::Result record_launch(cuda::Function function, unsigned grid_x, unsigned grid_y,
                           unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
                           unsigned shared_bytes, cuda::Stream stream, void** parameters,
                           void** extra) {
  CHECK(grid_y == 1 && grid_z == 1 && block_y == 1 && block_z == 1);
  CHECK(shared_bytes == 0 && extra == nullptr);
  uint64_t first = 0;
  std::memcpy(&first, parameters[0], sizeof first);
  driver.launches.push_back(
      {reinterpret_cast<const char*>(function), grid_x, block_x, stream, first});
  return driver.launch_result;
}

cuda::Api fake_api() {
  driver = FakeDriver();
  cuda::Api api;
  api.module_load = load_module;
  api.module_unload = unload_module;
  api.module_function = find_function;
  api.error_name = name_error;
  api.launch_kernel = record_launch;
  return api;
}

bool says(const Status& status, const std::string& text) {
  return status.message().find(text) != std::string::npos;
}

const char* const kNoLibrary = "/nowhere/libnvrtc.so";

void test_absent_compiler_is_explained() {
  std::unique_ptr<Nvrtc> nvrtc;
  Status status = Nvrtc::load(kNoLibrary, &nvrtc);
  CHECK(status.code() == Code::kUnavailable && says(status, kNoLibrary) && nvrtc == nullptr);
  // A library that is none of this kind.
  status = Nvrtc::load("libm.so.6", &nvrtc);
  CHECK(status.code() == Code::kUnavailable && says(status, "nvrtc") && nvrtc == nullptr);
}

void test_source_has_all_kernels_and_no_includes() {
  const std::string_view source = kernel_source();
  CHECK(source.data()[source.size()] == '\0');
  CHECK(source.find("#include") == std::string_view::npos);
  for (const char* name : {"kvx_copy_fragments(", "kvx_permute(", "kvx_poison("}) {
    CHECK(source.find(name) != std::string_view::npos);
  }
  if (kernel_fatbin().empty()) return;
  uint32_t magic = 0;
  std::memcpy(&magic, kernel_fatbin().data(), sizeof magic);
  CHECK(magic == 0xBA55ED50);
}

void test_nothing_fits() {
  const cuda::Api api = fake_api();
  driver.refused_images = 1;
  std::unique_ptr<KernelSet> kernels;
  const Status status = KernelSet::load(api, 9, 0, &kernels, kNoLibrary);
  CHECK(status.code() == Code::kUnavailable && kernels == nullptr);
  CHECK(says(status, kNoLibrary));
  CHECK(says(status, kernel_fatbin().empty() ? "no nvcc" : "CUDA_ERROR_OF_TEST"));
  CHECK(driver.modules == 0);
}

void test_a_missing_kernel_is_not_loaded_by_halves() {
  if (kernel_fatbin().empty()) return;
  const cuda::Api api = fake_api();
  driver.missing_function = "kvx_reshard";
  std::unique_ptr<KernelSet> kernels;
  const Status status = KernelSet::load(api, 9, 0, &kernels, kNoLibrary);
  CHECK(status.code() == Code::kUnavailable && says(status, "kvx_reshard"));
  CHECK(driver.images.size() == 1 && driver.modules == 0);
}

void check_launches(const cuda::Api& api, KernelSet& kernels) {
  const auto stream = reinterpret_cast<cuda::Stream>(const_cast<cuda::Api*>(&api));
  CHECK(kernels.copy_fragments(stream, 0xABC0, 3, 4096, 4).ok());
  CHECK(kernels.permute(stream, {.target = 0xBCD0}, 5).ok());
  CHECK(kernels.reshard(stream, {.whole = 0xCDE0}, 6).ok());
  CHECK(kernels.quantise_fp8(stream, {.wide = 0xDEF0}, 7).ok());
  CHECK(kernels.dequantise_fp8(stream, {.wide = 0xEF00}, 8).ok());
  CHECK(kernels.poison(stream, 0xF000, 10, 9).ok());
  const std::vector<Launch> expected = {
      {"kvx_copy_fragments", 4, 512, stream, 0xABC0}, {"kvx_permute", 5, 512, stream, 0xBCD0},
      {"kvx_reshard", 6, 512, stream, 0xCDE0},        {"kvx_amax", 7, 512, stream, 0xDEF0},
      {"kvx_scale", 7, 512, stream, 0xDEF0},          {"kvx_quantise_fp8", 7, 512, stream, 0xDEF0},
      {"kvx_dequantise_fp8", 8, 512, stream, 0xEF00}, {"kvx_poison", 9, 512, stream, 0xF000}};
  CHECK(driver.launches.size() == expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const Launch& made = driver.launches[i];
    CHECK(made.name == expected[i].name && made.ctas == expected[i].ctas);
    CHECK(made.threads == expected[i].threads && made.stream == expected[i].stream);
    // Two of the structs begin with the target; the layout is the device's too.
    CHECK(made.first == expected[i].first);
  }
  CHECK(kernels.launches() == static_cast<int64_t>(expected.size()));
}

void check_refusals(KernelSet& kernels) {
  const size_t before = driver.launches.size();
  const int64_t counted = kernels.launches();
  CHECK(kernels.copy_fragments(nullptr, 0, -1, 1, 1).code() == Code::kUsage);
  CHECK(kernels.copy_fragments(nullptr, 0, 1, 1, 0).code() == Code::kUsage);
  CHECK(kernels.poison(nullptr, 0, -1, 1).code() == Code::kUsage);
  CHECK(kernels.permute(nullptr, {.run_bytes = 1u << 31}, 1).code() == Code::kUsage);
  CHECK(kernels.reshard(nullptr, {.part_count = 17}, 1).code() == Code::kUsage);
  CHECK(kernels.quantise_fp8(nullptr, {.wide_kind = 3}, 1).code() == Code::kUsage);
  CHECK(kernels.copy_fragments(nullptr, 0, 0, 0, 1).ok());
  CHECK(kernels.poison(nullptr, 0, 0, 1).ok());
  CHECK(driver.launches.size() == before && kernels.launches() == counted);
  driver.launch_result = cuda::kErrorLaunchFailed;
  const Status status = kernels.quantise_fp8(nullptr, {}, 1);
  CHECK(status.code() == Code::kDevice && status.error_number() == cuda::kErrorLaunchFailed);
  CHECK(says(status, "kvx_amax") && says(status, "CUDA_ERROR_OF_TEST"));
  // What follows a failed launch is not launched.
  CHECK(driver.launches.size() == before + 1 && kernels.launches() == counted);
}

void test_launches() {
  if (kernel_fatbin().empty()) return;
  const cuda::Api api = fake_api();
  std::unique_ptr<KernelSet> kernels;
  CHECK(KernelSet::load(api, 9, 0, &kernels, kNoLibrary).ok());
  CHECK(kernels->origin() == "fatbin" && driver.images[0] == kernel_fatbin().data());
  CHECK(driver.functions.size() == 8);
  check_launches(api, *kernels);
  check_refusals(*kernels);
  kernels.reset();
  CHECK(driver.modules == 0);
}

// With a real NVRTC: every generation the fatbin has, and PTX for one that is yet to come.
void test_compiler(const char* path) {
  std::unique_ptr<Nvrtc> nvrtc;
  Status status = Nvrtc::load(path, &nvrtc);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
  CHECK(status.ok());
  std::printf("NVRTC %s\n", nvrtc->version().c_str());
  std::string image;
  for (int capability : {80, 86, 89, 90, 100, 120}) {
    status = nvrtc->compile(kernel_source(), capability / 10, capability % 10, &image);
    if (!status.ok()) std::fprintf(stderr, "%s\n", status.message().c_str());
    CHECK(status.ok() && image.compare(0, 4,
                                       "\x7f"
                                       "ELF") == 0);
  }
  CHECK(nvrtc->compile(kernel_source(), 99, 0, &image).ok());
  for (const char* name : {"kvx_copy_fragments", "kvx_permute", "kvx_dequantise_fp8"}) {
    CHECK(image.find(std::string(".entry ") + name) != std::string::npos);
  }
  status = nvrtc->compile("nonsense", 9, 0, &image);
  CHECK(status.code() == Code::kUnavailable && says(status, "nonsense"));
  CHECK(nvrtc->compile(kernel_source(), 1, 0, &image).code() == Code::kUnavailable);
  const cuda::Api api = fake_api();
  driver.refused_images = kernel_fatbin().empty() ? 0 : 1;
  std::unique_ptr<KernelSet> kernels;
  CHECK(KernelSet::load(api, 9, 0, &kernels, path).ok());
  CHECK(kernels->origin() == "nvrtc" && driver.modules == 1);
}

}  // namespace

int main(int count, char** arguments) {
  test_absent_compiler_is_explained();
  test_source_has_all_kernels_and_no_includes();
  test_nothing_fits();
  test_a_missing_kernel_is_not_loaded_by_halves();
  test_launches();
  if (count > 1) test_compiler(arguments[1]);
  return 0;
}
