// Every entry point of the driver fails once, at every call of a working day: a Status comes back,
// every request completes, what is reported as copied was copied, and nothing leaks.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <string_view>

#include "device_simulation.h"

namespace kvx::test {

namespace {

constexpr int64_t kBytes = 256 << 10;
constexpr int64_t kPieceBytes = 64 << 10;

constexpr const char* kEntryPoints[] = {
#define KVX_SYMBOL(member, symbol, parameters) #symbol,
    KVX_CUDA_REQUIRED(KVX_SYMBOL) KVX_CUDA_OPTIONAL(KVX_SYMBOL)
#undef KVX_SYMBOL
};

// What these refuse to take back is lost; health() says so.
bool gives_back(std::string_view symbol) {
  static const std::set<std::string_view> kGivers = {
      "cuEventDestroy", "cuStreamDestroy",  "cuMemFree",    "cuMemHostUnregister",
      "cuMemUnmap",     "cuMemAddressFree", "cuMemRelease", "cuIpcCloseMemHandle"};
  return kGivers.contains(symbol);
}

// Goes on after each failure, as far as what failed allows.
class Day {
 public:
  explicit Day(int64_t* statuses) : failures_(*statuses) {}

  void run() {
    std::shared_ptr<Device> opened;
    if (!ok(open_cuda_device({.library = kSimulation, .ordinal = 0}, &opened))) return;
    device_ = std::dynamic_pointer_cast<CudaDevice>(opened);
    int64_t free_bytes = 0;
    int64_t total_bytes = 0;
    (void)ok(device_->memory_bytes(&free_bytes, &total_bytes));
    if (!ok(device_->allocate(kBytes, false, &memory_))) return;
    if (!ok(device_->check_address(memory_->address(), &free_bytes))) return;
    share();
    peer();
    std::unique_ptr<PinnedRange> range;
    if (!ok(device_->pin_in_pieces(host_->data(), kBytes, kPieceBytes, &range))) return;
    for (const CopyMethod method : {CopyMethod::kBatch, CopyMethod::kRows, CopyMethod::kStaged}) {
      copy(method);
    }
    gate();
    bool is_done = false;
    (void)ok(range->wait(10.0, &is_done));
    CHECK(is_done);
  }

 private:
  bool ok(const Status& status) {
    if (status.ok()) return true;
    ++failures_;
    CHECK(!status.message().empty());
    return false;
  }

  void share() {
    std::unique_ptr<DeviceMemory> mapped;
    SharedMemoryHandle handle;
    (void)ok(device_->share(*memory_, &handle));
    if (!ok(device_->allocate(kBytes, true, &mapped))) return;
    if (!ok(device_->share(*mapped, &handle))) return;
    std::unique_ptr<DeviceMemory> opened;
    (void)ok(device_->open_shared(handle, &opened));
    close(handle.fd);
  }

  void peer() {
    std::shared_ptr<Device> second;
    if (!ok(open_cuda_device({.library = kSimulation, .ordinal = 1}, &second))) return;
    (void)ok(device_->enable_peer(*second));
  }

  void gate() {
    uint64_t stream = 0;
    if (!ok(device_->create_stream(&stream))) return;
    std::shared_ptr<Gate> gate;
    std::shared_ptr<StreamMark> mark;
    if (ok(device_->make_gate(&gate))) {
      (void)ok(gate->wait_on(stream, 1));
      (void)ok(device_->mark(stream, &mark));
      (void)ok(device_->fill(memory_->address(), 1, 4096, stream));
      gate->advance(1);
    }
    // Whoever made a stream has to try again until it is idle: that much is not kvx's to know.
    while (!ok(device_->synchronize_stream(stream)) && device_->health().code() != Code::kDevice) {
    }
    destroy(stream);
  }

  void destroy(uint64_t stream) {
    if (!ok(device_->destroy_stream(stream))) (void)device_->destroy_stream(stream);
  }

  CopyRequest fragments(CopyDirection direction, uint64_t token) const {
    CopyRequest request;
    request.direction = direction;
    request.token = token;
    // Twice the distance on the device, in the same order: rows, batches and staging are possible.
    for (uint64_t at = 0; at + 2048 <= kBytes / 2; at += 2048) {
      const uint64_t host = address_of(host_->data()) + at;
      const uint64_t apart = memory_->address() + 2 * at;
      const bool is_h2d = direction == CopyDirection::kHostToDevice;
      request.runs.add(is_h2d ? apart : host, is_h2d ? host : apart, 2048);
    }
    return request;
  }

  void copy(CopyMethod method) {
    CopyOptions options;
    options.staging_bytes = 1 << 20;
    for (auto& rates : options.calibration.gb_s) {
      rates[static_cast<size_t>(CopyMethod::kSingle)].fill(0.001);
      rates[static_cast<size_t>(method)].fill(1000);
    }
    if (device_->health().code() == Code::kDevice) return;
    Completions completions;
    std::unique_ptr<CopyBackend> copies;
    if (!ok(device_->make_copies(options, completions.sink(), &copies))) return;
    device_->note_host_access(host_->data(), kBytes, true);
    std::memset(host_->data(), static_cast<int>(method) + 1, kBytes);
    uint64_t stream = 0;
    std::shared_ptr<StreamMark> mark;
    if (ok(device_->create_stream(&stream))) (void)ok(device_->mark(stream, &mark));
    CopyRequest there = fragments(CopyDirection::kHostToDevice, 0);
    there.after = mark;
    copies->submit(std::move(there));
    const bool is_there = completions.wait(0).code == Code::kOk;
    // The simulation does not take the end of a context for the end of what was in it.
    const bool is_dead = device_->health().code() == Code::kDevice;
    if (!is_dead) {
      device_->note_host_access(host_->data(), kBytes, true);
      std::memset(host_->data(), 0, kBytes);
    }
    copies->submit(fragments(CopyDirection::kDeviceToHost, 1));
    const bool is_back = completions.wait(1).code == Code::kOk;
    if (is_there && is_back) device_->note_host_access(host_->data(), kBytes / 2, false);
    const auto is_right = [&](uint8_t byte) { return byte == static_cast<uint8_t>(method) + 1; };
    CHECK(!(is_there && is_back) ||
          std::all_of(host_->data(), host_->data() + kBytes / 2, is_right));
    failures_ += (is_there ? 0 : 1) + (is_back ? 0 : 1);
    CHECK(copies->close(10.0) == 0);
    if (stream != 0) destroy(stream);
  }

  int64_t& failures_;
  const std::unique_ptr<HostRegion> host_ = host_memory(kBytes);
  std::shared_ptr<CudaDevice> device_;
  std::unique_ptr<DeviceMemory> memory_;
};

int64_t fail_once(const char* symbol, uint64_t nth, int result, bool is_sticky) {
  KVX_SIMULATED(kvxsim_reset)();
  KVX_SIMULATED(kvxsim_set_devices)(2);
  if (symbol != nullptr) {
    KVX_SIMULATED(kvxsim_inject)(symbol, nth, result, is_sticky ? 1 : 0);
  }
  int64_t failures = 0;
  Day(&failures).run();
  return failures;
}

void test_a_day_without_failures() { CHECK(fail_once(nullptr, 0, 0, false) == 0); }

void test_every_call_fails_once() {
  for (const char* symbol : kEntryPoints) {
    int64_t noticed = 0;
    for (uint64_t nth = 1; nth <= 40; nth += nth < 12 ? 1 : 7) {
      noticed += fail_once(symbol, nth, cuda::kErrorUnknown, false);
      const bool is_clean = convictions() == 0 && (gives_back(symbol) || live_objects() == 0);
      if (!is_clean) std::fprintf(stderr, "%s, call %d\n", symbol, static_cast<int>(nth));
      CHECK(is_clean);
    }
    std::fprintf(stderr, "  %s: %d\n", symbol, static_cast<int>(noticed));
  }
  KVX_SIMULATED(kvxsim_reset)();
}

void test_every_call_ends_the_device() {
  for (const char* symbol : kEntryPoints) {
    for (uint64_t nth = 1; nth <= 9; nth += 4) {
      (void)fail_once(symbol, nth, cuda::kErrorIllegalAddress, true);
      CHECK(convictions() == 0);
    }
  }
  KVX_SIMULATED(kvxsim_reset)();
}

}  // namespace

}  // namespace kvx::test

int main() {
  using namespace kvx::test;
  RUN_ON_SIMULATION(test_a_day_without_failures);
  RUN_ON_SIMULATION(test_every_call_fails_once);
  RUN_ON_SIMULATION(test_every_call_ends_the_device);
  return 0;
}
