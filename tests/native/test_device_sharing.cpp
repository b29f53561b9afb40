// Memory of a device in two processes: this test runs itself as the second one, which maps what the
// first one shares, reads it and writes it.
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <string>

#include "device_simulation.h"

namespace kvx::test {

namespace {

constexpr int64_t kBytes = 1 << 20;

std::shared_ptr<Device> open_kind(const std::string& kind) {
  std::shared_ptr<Device> device;
  if (kind == "emulated") {
    CHECK_OK(open_emulated_device(64 << 20, &device));
  } else {
    device = open_simulated();
  }
  return device;
}

void fill(Device& device, const DeviceMemory& memory, uint8_t value) {
  uint64_t stream = 0;
  CHECK_OK(device.create_stream(&stream));
  CHECK_OK(device.fill(memory.address(), value, memory.bytes(), stream));
  CHECK_OK(device.synchronize_stream(stream));
  CHECK_OK(device.destroy_stream(stream));
}

// The last byte, by a copy as anybody would make one.
uint8_t last_byte(Device& device, const DeviceMemory& memory) {
  Completions completions;
  std::unique_ptr<CopyBackend> copies;
  CHECK_OK(device.make_copies({}, completions.sink(), &copies));
  const auto host = host_memory(4096);
  const auto last = static_cast<uint64_t>(memory.bytes() - 4096);
  copies->submit(one_run(CopyDirection::kDeviceToHost, address_of(host->data()),
                         memory.address() + last, 4096, 0));
  CHECK(completions.wait(0).code == Code::kOk);
  CHECK(copies->close(5.0) == 0);
  device.note_host_access(host->data(), 4096, false);
  return host->data()[4095];
}

int be_second(const std::string& kind, const std::string& bytes, int fd, int64_t size_bytes) {
  SharedMemoryHandle handle;
  handle.fd = fd;
  handle.size_bytes = size_bytes;
  for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
    handle.bytes.push_back(static_cast<uint8_t>(std::stoi(bytes.substr(i, 2), nullptr, 16)));
  }
  const auto device = open_kind(kind);
  {
    std::unique_ptr<DeviceMemory> memory;
    CHECK_OK(device->open_shared(handle, &memory));
    CHECK(memory->bytes() == size_bytes);
    CHECK(last_byte(*device, *memory) == 17);
    fill(*device, *memory, 18);
  }
  CHECK_OK(device->health());
  return kind == "emulated" || convictions() == 0 ? 0 : 1;
}

std::string in_hexadecimal(const std::vector<uint8_t>& bytes) {
  std::string text;
  for (const uint8_t byte : bytes) {
    std::array<char, 3> digits{};
    std::snprintf(digits.data(), digits.size(), "%02x", byte);
    text += digits.data();
  }
  return text;
}

int run_second(const char* program, const std::string& kind, const SharedMemoryHandle& handle) {
  // A descriptor that the second process inherits, where a real one would be sent to it.
  const int fd = handle.fd < 0 ? -1 : dup(handle.fd);
  const std::string bytes = in_hexadecimal(handle.bytes);
  const std::string fd_text = std::to_string(fd);
  const std::string size = std::to_string(handle.size_bytes);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    execl(program, program, kind.c_str(), bytes.c_str(), fd_text.c_str(), size.c_str(), nullptr);
    _exit(127);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  if (fd >= 0) close(fd);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void share_with_second(const char* program, const std::string& kind, bool is_exportable) {
  const auto device = open_kind(kind);
  const auto memory = device_memory(*device, kBytes, is_exportable);
  fill(*device, *memory, 17);
  SharedMemoryHandle handle;
  CHECK_OK(device->share(*memory, &handle));
  CHECK(run_second(program, kind, handle) == 0);
  CHECK(last_byte(*device, *memory) == 18);
  if (handle.fd >= 0) close(handle.fd);
}

void test_handles_are_checked() {
  const auto device = open_simulated();
  const auto memory = device_memory(*device, kBytes);
  SharedMemoryHandle handle;
  CHECK_OK(device->share(*memory, &handle));
  std::unique_ptr<DeviceMemory> opened;
  SharedMemoryHandle wrong = handle;
  wrong.bytes.pop_back();
  CHECK(device->open_shared(wrong, &opened).code() == Code::kUsage);
  wrong = handle;
  ++wrong.size_bytes;
  CHECK(device->open_shared(wrong, &opened).code() == Code::kUsage);
  wrong = {{}, -1, 4096};
  CHECK(device->open_shared(wrong, &opened).code() == Code::kUsage);
  const int no_memory = open("/dev/null", O_RDWR | O_CLOEXEC);
  wrong = {{}, no_memory, 4096};
  CHECK(!device->open_shared(wrong, &opened).ok());
  close(no_memory);
  const auto other = open_kind("emulated");
  CHECK(other->share(*memory, &handle).code() == Code::kUsage);
}

}  // namespace

}  // namespace kvx::test

int main(int count, char** arguments) {
  using namespace kvx::test;
  if (count == 5) {
    return be_second(arguments[1], arguments[2], std::atoi(arguments[3]), std::atoll(arguments[4]));
  }
  const char* const program = "/proc/self/exe";
  share_with_second(program, "emulated", true);
  share_with_second(program, "emulated", false);
  on_simulation("plain memory", [&] { share_with_second(program, "simulated", false); });
  on_simulation("exportable memory", [&] { share_with_second(program, "simulated", true); });
  RUN_ON_SIMULATION(test_handles_are_checked);
  return 0;
}
