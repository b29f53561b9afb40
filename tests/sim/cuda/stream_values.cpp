// Words that streams wait for and write: how the host releases a stream that is already queued, and
// how a stream tells the host. Such a word orders what lies around it.
#include <chrono>

#include "copies.h"
#include "entry_points.h"
#include "simulation.h"

namespace kvx::sim {

namespace {

constexpr std::chrono::microseconds kFirstPause(20);

Result enqueue_value(Call& call, Stream stream, DevicePointer address, CopySide side,
                     std::function<void(std::unique_lock<std::mutex>&, StreamState&)> run) {
  const auto on = call->streams.find(call, stream);
  if (on == nullptr) return kErrorInvalidHandle;
  Operation operation;
  operation.label.symbol = call.symbol();
  operation.touched.push_back({address, sizeof(uint32_t)});
  operation.run = [side = std::move(side), run = std::move(run)](
                      auto& lock, StreamState& running, const Operation&) { run(lock, running); };
  call->streams.enqueue(*call.operator->(), *on, std::move(operation));
  return kSuccess;
}

Result resolve_word(Call& call, DevicePointer address, CopySide* side) {
  if (address % sizeof(uint32_t) != 0) return kErrorInvalidValue;
  const Result result = resolve(call, address, sizeof(uint32_t), side);
  if (result != kSuccess) return result;
  return side->place == Place::kPageable ? kErrorInvalidValue : kSuccess;
}

}  // namespace

extern "C" {

Result cuStreamWaitValue32(Stream stream, DevicePointer address, uint32_t value, unsigned flags) {
  KVX_SIM_ENTER(call)
  if (flags != kWaitValueGeq) return kErrorNotSupported;
  CopySide side;
  const Result result = resolve_word(call, address, &side);
  if (result != kSuccess) return result;
  Simulation& sim = *call.operator->();
  auto* word = reinterpret_cast<uint32_t*>(side.bytes);
  const auto wait = [&sim, word, address, value](std::unique_lock<std::mutex>& lock,
                                                 StreamState& running) {
    std::chrono::microseconds length = kFirstPause;
    // Greater or equal is meant cyclically.
    const auto is_released = [&] {
      return static_cast<int32_t>(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0;
    };
    // Once the context is lost its owner may free the word.
    while (!is_lost(sim, running) && !is_released()) pause(lock, &length);
    running.clock.join(sim.races.seen(address));
  };
  sim.races.words.try_emplace(address);
  return enqueue_value(call, stream, address, std::move(side), wait);
}

Result cuStreamWriteValue32(Stream stream, DevicePointer address, uint32_t value, unsigned flags) {
  KVX_SIM_ENTER(call)
  if (flags != 0) return kErrorNotSupported;
  CopySide side;
  const Result result = resolve_word(call, address, &side);
  if (result != kSuccess) return result;
  Simulation& sim = *call.operator->();
  auto* word = reinterpret_cast<uint32_t*>(side.bytes);
  const auto write = [&sim, word, address, value](std::unique_lock<std::mutex>&,
                                                  StreamState& running) {
    sim.races.words[address].clock.join(running.clock);
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
  };
  return enqueue_value(call, stream, address, std::move(side), write);
}

}  // extern "C"

KVX_SIM_ALIAS(cuStreamWaitValue32_v2, cuStreamWaitValue32)
KVX_SIM_ALIAS(cuStreamWriteValue32_v2, cuStreamWriteValue32)

}  // namespace kvx::sim
