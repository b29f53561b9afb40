// cuEvent* and the stream's wait for one. An event is its last recording; an interprocess event
// counts recordings in memory that the processes share.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "entry_points.h"
#include "simulation.h"

namespace kvx::sim {

namespace {

using std::chrono::microseconds;
using std::chrono::steady_clock;

constexpr microseconds kFirstPause(50);

bool is_reached(const EventState& event, uint64_t number) {
  return event.shared->words->ended.load(std::memory_order_acquire) >= number;
}

bool is_done(const EventState& event) {
  if (event.shared != nullptr) return is_reached(event, event.shared->words->begun.load());
  return event.last == nullptr || event.last->is_done;
}

// The host has seen the event: it knows what came before.
void observe(Call& call, const EventState& event) {
  if (event.last != nullptr && event.last->is_done) call->races.host.join(event.last->clock);
}

void record(Call& call, StreamState& stream, EventState& event) {
  auto recording = std::make_shared<Recording>();
  event.last = recording;
  Operation operation;
  operation.label.symbol = call.symbol();
  operation.is_run_when_lost = true;
  const auto shared = event.shared;
  const uint64_t number = shared == nullptr ? 0 : shared->words->begun.fetch_add(1) + 1;
  operation.run = [recording, shared, number](auto&, StreamState& on, const Operation&) {
    recording->is_done = true;
    recording->clock = on.clock;
    recording->when = steady_clock::now();
    if (shared == nullptr) return;
    auto& ended = shared->words->ended;
    ended.store(std::max(ended.load(), number), std::memory_order_release);
  };
  call->streams.enqueue(*call.operator->(), stream, std::move(operation));
}

// Waits for what was recorded by now; later recordings do not matter.
auto waiter(Simulation& sim, const std::shared_ptr<EventState>& event) {
  const auto recording = event->last;
  const uint64_t number = event->shared == nullptr ? 0 : event->shared->words->begun.load();
  return [&sim, event, recording, number](std::unique_lock<std::mutex>& lock, StreamState& on,
                                          const Operation&) {
    if (event->shared != nullptr) {
      microseconds length = kFirstPause;
      while (!is_reached(*event, number) && !is_lost(sim, on)) pause(lock, &length);
    } else {
      sim.changed.wait(lock, [&] { return recording->is_done || is_lost(sim, on); });
    }
    if (recording != nullptr && recording->is_done) on.clock.join(recording->clock);
  };
}

}  // namespace

std::shared_ptr<SharedEvent> SharedEvent::create(int fd) {
  const bool is_new = fd < 0;
  if (is_new) fd = memfd_create("kvx-simulated-event", MFD_CLOEXEC);
  if (fd < 0) return nullptr;
  const bool is_sized = !is_new || ftruncate(fd, sizeof(Words)) == 0;
  void* mapped = MAP_FAILED;
  if (is_sized) {
    mapped = mmap(nullptr, sizeof(Words), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  if (mapped == MAP_FAILED) {
    close(fd);
    return nullptr;
  }
  return std::make_shared<SharedEvent>(fd, static_cast<Words*>(mapped));
}

SharedEvent::~SharedEvent() {
  munmap(words, sizeof(Words));
  close(fd);
}

extern "C" {

Result cuEventCreate(Event* event, unsigned flags) {
  KVX_SIM_ENTER(call)
  constexpr unsigned kKnown = kEventBlockingSync | kEventDisableTiming | kEventInterprocess;
  if (event == nullptr || (flags & ~kKnown) != 0) return kErrorInvalidValue;
  const bool is_shared = (flags & kEventInterprocess) != 0;
  if (is_shared && (flags & kEventDisableTiming) == 0) return kErrorInvalidValue;
  std::shared_ptr<SharedEvent> shared = is_shared ? SharedEvent::create(-1) : nullptr;
  if (is_shared && shared == nullptr) return kErrorOutOfMemory;
  const auto created = call->streams.create_event(call.device(), flags);
  created->shared = std::move(shared);
  *event = handle_of<Event>(event_number(created->id));
  return kSuccess;
}

Result cuEventDestroy(Event event) {
  KVX_SIM_ENTER(call)
  return call->streams.events.erase(number_of(event)) == 1 ? kSuccess : kErrorInvalidHandle;
}

Result cuEventRecord(Event event, Stream stream) {
  KVX_SIM_ENTER(call)
  const auto found = call->streams.find(event);
  const auto on = call->streams.find(call, stream);
  if (found == nullptr || on == nullptr) return kErrorInvalidHandle;
  if (found->device != on->device) return kErrorInvalidHandle;
  record(call, *on, *found);
  return kSuccess;
}

Result cuEventQuery(Event event) {
  KVX_SIM_ENTER(call)
  const auto found = call->streams.find(event);
  if (found == nullptr) return kErrorInvalidHandle;
  if (!is_done(*found)) return kErrorNotReady;
  observe(call, *found);
  return kSuccess;
}

Result cuEventSynchronize(Event event) {
  KVX_SIM_ENTER(call)
  const auto found = call->streams.find(event);
  if (found == nullptr) return kErrorInvalidHandle;
  // What is recorded meanwhile by another thread is not waited for.
  const EventState then = *found;
  const uint64_t number = then.shared == nullptr ? 0 : then.shared->words->begun.load();
  microseconds length = kFirstPause;
  Device& device = call.device();
  const auto is_over = [&] {
    const bool is_ended = then.shared != nullptr ? is_reached(then, number) : is_done(then);
    return is_ended || device.sticky != kSuccess;
  };
  while (!is_over()) {
    if (then.shared != nullptr) {
      pause(call.lock(), &length);
    } else {
      call->changed.wait(call.lock(), is_over);
    }
  }
  if (device.sticky != kSuccess) return device.sticky;
  observe(call, then);
  return kSuccess;
}

Result cuEventElapsedTime(float* milliseconds, Event start, Event end) {
  KVX_SIM_ENTER(call)
  const auto first = call->streams.find(start);
  const auto second = call->streams.find(end);
  if (first == nullptr || second == nullptr) return kErrorInvalidHandle;
  if (((first->flags | second->flags) & kEventDisableTiming) != 0) return kErrorInvalidHandle;
  if (first->last == nullptr || second->last == nullptr) return kErrorInvalidHandle;
  if (!first->last->is_done || !second->last->is_done) return kErrorNotReady;
  const std::chrono::duration<float, std::milli> elapsed = second->last->when - first->last->when;
  *milliseconds = elapsed.count();
  return kSuccess;
}

Result cuStreamWaitEvent(Stream stream, Event event, unsigned flags) {
  KVX_SIM_ENTER(call)
  const auto found = call->streams.find(event);
  const auto on = call->streams.find(call, stream);
  if (found == nullptr || on == nullptr) return kErrorInvalidHandle;
  if (flags != 0) return kErrorInvalidValue;
  if (found->last == nullptr && found->shared == nullptr) return kSuccess;
  Operation operation;
  operation.label.symbol = call.symbol();
  operation.run = waiter(*call.operator->(), found);
  call->streams.enqueue(*call.operator->(), *on, std::move(operation));
  return kSuccess;
}

}  // extern "C"

KVX_SIM_ALIAS(cuEventDestroy_v2, cuEventDestroy)

}  // namespace kvx::sim
