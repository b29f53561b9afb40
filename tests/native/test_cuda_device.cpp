// The CUDA device on the simulated driver: opening it, memory, pinned pieces, gates, peers.
#include <cstring>
#include <thread>

#include "device_simulation.h"

namespace kvx::test {

namespace {

constexpr int64_t kPieceBytes = 64 << 10;

void test_opening() {
  KVX_SIMULATED(kvxsim_set_devices)(2);
  std::vector<DeviceInfo> devices;
  CHECK_OK(list_cuda_devices(kSimulation, &devices));
  CHECK(devices.size() == 2 && devices[1].ordinal == 1);
  CHECK(devices[0].uuid.size() == 32 && devices[0].uuid != devices[1].uuid);
  const auto device = open_simulated(1);
  CHECK(device->info().uuid == devices[1].uuid);
  CHECK(device->info().has_batch_copy && device->info().has_stream_values);
  std::shared_ptr<Device> none;
  CHECK(open_cuda_device({.library = kSimulation, .ordinal = 2}, &none).code() ==
        Code::kUnavailable);
}

void test_what_is_missing_is_said() {
  std::shared_ptr<Device> device;
  const CudaDeviceOptions options{.library = kSimulation};
  KVX_SIMULATED(kvxsim_set_driver_version)(11080);
  Status status = open_cuda_device(options, &device);
  CHECK(status.code() == Code::kUnavailable);
  CHECK(status.message().find("11.8") != std::string::npos);
  KVX_SIMULATED(kvxsim_reset)();
  KVX_SIMULATED(kvxsim_set_devices)(0);
  status = open_cuda_device(options, &device);
  CHECK(status.code() == Code::kUnavailable);
  CHECK(status.message().find("no device") != std::string::npos);
  KVX_SIMULATED(kvxsim_reset)();
  KVX_SIMULATED(kvxsim_inject)("cuInit", 1, cuda::kErrorStubLibrary, 0);
  status = open_cuda_device(options, &device);
  CHECK(status.code() == Code::kUnavailable && status.error_number() == 34);
  CHECK(status.message().find("stub") != std::string::npos);
  KVX_SIMULATED(kvxsim_reset)();
  KVX_SIMULATED(kvxsim_set_driver_version)(12040);
  CHECK_OK(open_cuda_device(options, &device));
  CHECK(!device->info().has_batch_copy && device->info().driver_version == 12040);
}

void test_memory() {
  KVX_SIMULATED(kvxsim_set_devices)(2);
  KVX_SIMULATED(kvxsim_set_total_memory)(64 << 20);
  const auto device = open_simulated();
  const auto second = open_simulated(1);
  std::unique_ptr<DeviceMemory> memory;
  CHECK(device->allocate(65 << 20, false, &memory).code() == Code::kCapacity);
  CHECK(device->allocate(65 << 20, true, &memory).code() == Code::kCapacity);
  CHECK(device->allocate(-1, false, &memory).code() == Code::kUsage);
  const auto exportable = device_memory(*device, 1000, true);
  CHECK(exportable->bytes() >= 1000 && exportable->is_exportable());
  const auto plain = device_memory(*device, 1000);
  int64_t left = 0;
  for (const DeviceMemory* each : {exportable.get(), plain.get()}) {
    CHECK_OK(device->check_address(each->address() + 10, &left));
    CHECK(left >= each->bytes() - 10);
    CHECK(second->check_address(each->address(), &left).code() == Code::kUsage);
  }
  CHECK(device->check_address(address_of(&left), &left).code() == Code::kUsage);
  CHECK_OK(device->health());
}

void test_what_is_lost_is_remembered() {
  const auto device = open_simulated();
  {
    const auto memory = device_memory(*device, 1000);
    KVX_SIMULATED(kvxsim_inject)("cuMemFree", 1, cuda::kErrorUnknown, 0);
  }
  CHECK(device->health().code() == Code::kCapacity);
  CHECK(simulated_count("live_allocations") == 1);
  KVX_SIMULATED(kvxsim_reset)();
}

void test_pinning() {
  const auto device = open_simulated();
  const auto host = host_memory(10 * kPieceBytes + 4096);
  std::unique_ptr<PinnedRange> range;
  CHECK(device->pin(host->data() + 1, 4096, &range).code() == Code::kUsage);
  CHECK_OK(device->pin_in_pieces(host->data(), host->bytes(), kPieceBytes, &range));
  std::unique_ptr<PinnedRange> overlapping;
  CHECK(device->pin(host->data() + 4096, 4096, &overlapping).code() == Code::kUsage);
  bool is_done = false;
  CHECK_OK(range->wait(10.0, &is_done));
  CHECK(is_done && range->pinned_bytes() == host->bytes());
  CHECK(simulated_count("live_registrations") == 11);
  range.reset();
  CHECK(simulated_count("live_registrations") == 0);
  CHECK_OK(device->pin(host->data() + 4096, 4096, &overlapping));
}

void test_a_refused_piece_is_pageable() {
  const auto device = open_simulated();
  const auto memory = device_memory(*device, 4 * kPieceBytes);
  const auto host = host_memory(4 * kPieceBytes);
  std::memset(host->data(), 7, static_cast<size_t>(host->bytes()));
  KVX_SIMULATED(kvxsim_inject)("cuMemHostRegister", 2, cuda::kErrorOutOfMemory, 0);
  std::unique_ptr<PinnedRange> range;
  CHECK_OK(device->pin_in_pieces(host->data(), host->bytes(), kPieceBytes, &range));
  bool is_done = false;
  CHECK(range->wait(10.0, &is_done).code() == Code::kCapacity);
  CHECK(is_done && range->pinned_bytes() == 3 * kPieceBytes);
  Completions completions;
  std::unique_ptr<CopyBackend> copies;
  CHECK_OK(device->make_copies({}, completions.sink(), &copies));
  device->note_host_access(host->data(), host->bytes(), true);
  CopyRequest request;
  request.direction = CopyDirection::kHostToDevice;
  for (int i = 0; i < 4; ++i) {
    const auto at = static_cast<uint64_t>(i * kPieceBytes);
    request.runs.add(memory->address() + at, address_of(host->data()) + at, kPieceBytes);
  }
  copies->submit(std::move(request));
  CHECK(completions.wait(0).code == Code::kOk);
  CHECK(copies->stats().pageable_bytes == kPieceBytes);
  std::vector<uint8_t> seen(static_cast<size_t>(4 * kPieceBytes));
  CHECK(KVX_SIMULATED(kvxsim_copy_from_device)(seen.data(), memory->address(), seen.size()) == 0);
  CHECK(std::memcmp(seen.data(), host->data(), seen.size()) == 0);
  CHECK(copies->close(1.0) == 0);
}

void test_gates_hold_streams_up() {
  const auto device = open_simulated();
  const auto memory = device_memory(*device, 4096);
  uint64_t stream = 0;
  CHECK_OK(device->create_stream(&stream));
  std::shared_ptr<Gate> gate;
  CHECK_OK(device->make_gate(&gate));
  CHECK(gate->wait_on(0, 1).code() == Code::kUsage);
  CHECK_OK(gate->wait_on(stream, 1));
  CHECK_OK(gate->wait_on(stream, 2));
  CHECK_OK(device->fill(memory->address(), 5, 4096, stream));
  gate->advance(1);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const Status still = device->context().call("cuStreamQuery", [&] {
    return device->api().stream_query(reinterpret_cast<cuda::Stream>(stream));
  });
  CHECK(still.error_number() == cuda::kErrorNotReady);
  // Given back while it is waited for: no other gate may have its word before the wait is over.
  Gate* const raw = gate.get();
  std::vector<std::shared_ptr<Gate>> others;
  for (int i = 0; i < 3000; ++i) {
    CHECK_OK(device->make_gate(&others.emplace_back()));
    CHECK(others.back()->value() == 0);
  }
  raw->advance(2);
  CHECK_OK(device->synchronize_stream(stream));
  CHECK_OK(device->destroy_stream(stream));
}

void test_words_of_gates_are_not_used_while_awaited() {
  const auto device = open_simulated();
  uint64_t stream = 0;
  CHECK_OK(device->create_stream(&stream));
  std::shared_ptr<Gate> gate;
  CHECK_OK(device->make_gate(&gate));
  CHECK_OK(gate->wait_on(stream, 1));
  // Its owner has reached the value and gone, but the stream is busy before the wait.
  KVX_SIMULATED(kvxsim_freeze)(kKvxsimOnDevice, 1);
  const auto memory = device_memory(*device, 4096);
  gate->advance(1);
  CHECK_OK(device->synchronize_stream(stream));
  CHECK_OK(device->fill(memory->address(), 1, 4096, stream));
  CHECK_OK(gate->wait_on(stream, 1));
  gate.reset();
  std::vector<std::shared_ptr<Gate>> others(1025);
  for (auto& other : others) CHECK_OK(device->make_gate(&other));
  KVX_SIMULATED(kvxsim_freeze)(kKvxsimOnDevice, 0);
  CHECK_OK(device->synchronize_stream(stream));  // would hang had another gate set it back to 0
  CHECK_OK(device->destroy_stream(stream));
}

void test_streams_that_cannot_wait() {
  KVX_SIMULATED(kvxsim_set_has_stream_values)(0);
  const auto device = open_simulated();
  CHECK(!device->info().has_stream_values);
  std::shared_ptr<Gate> gate;
  CHECK_OK(device->make_gate(&gate));
  CHECK(gate->wait_on(5, 1).code() == Code::kUnavailable);
}

void test_peers() {
  KVX_SIMULATED(kvxsim_set_devices)(2);
  const auto first = open_simulated(0);
  const auto second = open_simulated(1);
  const auto before = device_memory(*second, 1 << 16, true);
  CHECK(first->enable_peer(*first).code() == Code::kUsage);
  CHECK_OK(first->enable_peer(*second));
  CHECK_OK(second->enable_peer(*first));
  const auto after = device_memory(*second, 1 << 16, true);
  const auto plain = device_memory(*second, 1 << 16);
  const auto own = device_memory(*first, 1 << 16);
  Completions completions;
  std::unique_ptr<CopyBackend> copies;
  CHECK_OK(first->make_copies({}, completions.sink(), &copies));
  uint64_t token = 0;
  for (const DeviceMemory* source : {before.get(), after.get(), plain.get()}) {
    CHECK(KVX_SIMULATED(kvxsim_memset)(source->address(), static_cast<int>(token + 1), 1 << 16) ==
          0);
    copies->submit(
        one_run(CopyDirection::kDeviceToDevice, own->address(), source->address(), 1 << 16, token));
    CHECK(completions.wait(token).code == Code::kOk);
    uint8_t seen = 0;
    CHECK(KVX_SIMULATED(kvxsim_copy_from_device)(&seen, own->address() + 999, 1) == 0);
    CHECK(seen == ++token);
  }
  CHECK(copies->close(1.0) == 0);
}

}  // namespace

}  // namespace kvx::test

int main() {
  using namespace kvx::test;
  RUN_ON_SIMULATION(test_opening);
  RUN_ON_SIMULATION(test_what_is_missing_is_said);
  RUN_ON_SIMULATION(test_memory);
  RUN_ON_SIMULATION(test_what_is_lost_is_remembered);
  RUN_ON_SIMULATION(test_pinning);
  RUN_ON_SIMULATION(test_a_refused_piece_is_pageable);
  RUN_ON_SIMULATION(test_gates_hold_streams_up);
  RUN_ON_SIMULATION(test_words_of_gates_are_not_used_while_awaited);
  RUN_ON_SIMULATION(test_streams_that_cannot_wait);
  RUN_ON_SIMULATION(test_peers);
  return 0;
}
