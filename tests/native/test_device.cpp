// The emulated device, and with it the contract of kvx/device.h that needs no driver.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "device_fixture.h"

namespace kvx::test {

namespace {

constexpr int64_t kDeviceBytes = 64 << 20;

std::shared_ptr<Device> open_emulated() {
  std::shared_ptr<Device> device;
  CHECK_OK(open_emulated_device(kDeviceBytes, &device));
  return device;
}

std::unique_ptr<CopyBackend> copies_of(Device& device, CopySink sink) {
  std::unique_ptr<CopyBackend> copies;
  CHECK_OK(device.make_copies({}, std::move(sink), &copies));
  return copies;
}

void test_memory_is_accounted() {
  const auto device = open_emulated();
  CHECK(device->info().is_emulated && device->info().ordinal == -1);
  int64_t free_bytes = 0;
  int64_t total_bytes = 0;
  {
    const auto memory = device_memory(*device, 40 << 20);
    CHECK_OK(device->memory_bytes(&free_bytes, &total_bytes));
    CHECK(free_bytes == kDeviceBytes - (40 << 20) && total_bytes == kDeviceBytes);
    std::unique_ptr<DeviceMemory> more;
    CHECK(device->allocate(25 << 20, false, &more).code() == Code::kCapacity);
    CHECK(device->allocate(0, false, &more).code() == Code::kUsage);
    int64_t left = 0;
    CHECK_OK(device->check_address(memory->address() + 100, &left));
    CHECK(left == memory->bytes() - 100);
    CHECK(device->check_address(memory->address() - 1, &left).code() == Code::kUsage);
    CHECK(device->check_address(address_of(&left), &left).code() == Code::kUsage);
  }
  CHECK_OK(device->memory_bytes(&free_bytes, &total_bytes));
  CHECK(free_bytes == kDeviceBytes);
}

void test_bytes_go_there_and_back() {
  const auto device = open_emulated();
  const auto memory = device_memory(*device, 1 << 20);
  const auto second = device_memory(*device, 1 << 20);
  const auto host = host_memory(1 << 20);
  for (int64_t i = 0; i < host->bytes(); ++i)
    host->data()[i] = static_cast<uint8_t>(i * 7 + i / 256);
  const std::vector<uint8_t> wanted(host->data(), host->data() + host->bytes());
  Completions completions;
  const auto copies = copies_of(*device, completions.sink());
  const size_t bytes = 1 << 20;
  copies->submit(
      one_run(CopyDirection::kHostToDevice, memory->address(), address_of(host->data()), bytes, 1));
  CHECK(completions.wait(1).code == Code::kOk);
  copies->submit(
      one_run(CopyDirection::kDeviceToDevice, second->address(), memory->address(), bytes, 2));
  CHECK(completions.wait(2).code == Code::kOk);
  std::memset(host->data(), 0, bytes);
  copies->submit(
      one_run(CopyDirection::kDeviceToHost, address_of(host->data()), second->address(), bytes, 3));
  CHECK(completions.wait(3).code == Code::kOk);
  CHECK(std::equal(wanted.begin(), wanted.end(), host->data()));
  const CopyStats stats = copies->stats();
  for (size_t i = 0; i < kCopyDirections; ++i) {
    CHECK(stats.bytes[i] == 1 << 20 && stats.requests[i] == 1);
  }
  CHECK(copies->close(1.0) == 0);
}

// Every request has one completion, whatever closing and cancelling do meanwhile.
void test_close_and_cancel_complete_everything() {
  const auto device = open_emulated();
  const auto memory = device_memory(*device, 8 << 20);
  const auto host = host_memory(8 << 20);
  Completions completions;
  const auto copies = copies_of(*device, completions.sink());
  constexpr uint64_t kRequests = 200;
  std::atomic<uint64_t> submitted{0};
  std::thread submitting([&] {
    for (uint64_t token = 0; token < kRequests; ++token) {
      // The directions run side by side, so each has a half of the memory.
      const uint64_t on_host = address_of(host->data()) + (token % 2) * (4 << 20);
      const uint64_t on_device = memory->address() + (token % 2) * (4 << 20);
      copies->submit(
          token % 2 == 0
              ? one_run(CopyDirection::kHostToDevice, on_device, on_host, 1 << 16, token)
              : one_run(CopyDirection::kDeviceToHost, on_host, on_device, 1 << 16, token));
      if (token % 3 == 0) copies->cancel(token);
      submitted = token + 1;
    }
  });
  while (submitted.load() < kRequests / 2) std::this_thread::yield();
  CHECK(copies->close(10.0) == 0);
  submitting.join();
  for (uint64_t token = 0; token < kRequests; ++token) {
    const Code code = completions.wait(token).code;
    CHECK(code == Code::kOk || code == Code::kCancelled);
  }
}

void test_malformed_requests_are_refused() {
  const auto device = open_emulated();
  Completions completions;
  const auto copies = copies_of(*device, completions.sink());
  CopyRequest request;
  request.runs.targets.push_back(1);
  request.token = 9;
  copies->submit(std::move(request));
  CHECK(completions.wait(9).code == Code::kUsage);
  CopyRequest empty;
  empty.token = 10;
  copies->submit(std::move(empty));
  CHECK(completions.wait(10).code == Code::kOk);
  CHECK(copies->close(1.0) == 0);
}

void test_memory_is_shared() {
  const auto device = open_emulated();
  const auto other = open_emulated();
  const auto memory = device_memory(*device, 10000, true);
  SharedMemoryHandle handle;
  CHECK_OK(device->share(*memory, &handle));
  SharedMemoryHandle refused;
  CHECK(other->share(*memory, &refused).code() == Code::kUsage);
  std::unique_ptr<DeviceMemory> mapped;
  CHECK_OK(other->open_shared(handle, &mapped));
  CHECK(close(handle.fd) == 0);
  uint64_t stream = 0;
  CHECK_OK(device->create_stream(&stream));
  CHECK_OK(device->fill(memory->address(), 42, memory->bytes(), stream));
  CHECK_OK(device->synchronize_stream(stream));
  CHECK(reinterpret_cast<const uint8_t*>(mapped->address())[9999] == 42);
  CHECK(device->fill(memory->address(), 1, memory->bytes() + 1, stream).code() == Code::kUsage);
  CHECK_OK(device->destroy_stream(stream));
  CHECK(device->synchronize_stream(stream).code() == Code::kUsage);
}

void test_gates_only_grow() {
  const auto device = open_emulated();
  std::shared_ptr<Gate> gate;
  CHECK_OK(device->make_gate(&gate));
  gate->advance(3);
  gate->advance(2);
  CHECK(gate->value() == 3);
  CHECK(gate->wait_on(2, 3).code() == Code::kUnavailable);
}

void test_there_is_no_driver_here() {
  std::shared_ptr<Device> device;
  const Status status = open_cuda_device({.library = "libnosuch.so.1"}, &device);
  CHECK(status.code() == Code::kUnavailable);
  CHECK(status.message().find("libnosuch") != std::string::npos);
  std::vector<DeviceInfo> devices;
  CHECK(list_cuda_devices("libnosuch.so.1", &devices).code() == Code::kUnavailable);
  // A library that is no driver.
  CHECK(open_cuda_device({.library = "libm.so.6"}, &device).code() == Code::kUnavailable);
}

}  // namespace

}  // namespace kvx::test

int main() {
  using namespace kvx::test;
  test_memory_is_accounted();
  test_bytes_go_there_and_back();
  test_close_and_cancel_complete_everything();
  test_malformed_requests_are_refused();
  test_memory_is_shared();
  test_gates_only_grow();
  test_there_is_no_driver_here();
  return 0;
}
