#include "streams.h"

#include <algorithm>

#include "simulation.h"

namespace kvx::sim {

namespace {

// CU_STREAM_LEGACY and CU_STREAM_PER_THREAD are small numbers in place of handles.
constexpr uint64_t kSpecialStreamMax = 2;
constexpr std::chrono::microseconds kPauseMax(1000);

void run_stream(Simulation& sim, const std::shared_ptr<StreamState>& stream) {
  std::unique_lock lock(sim.mutex);
  for (;;) {
    stream->work.wait(lock, [&] { return stream->is_stopping || !stream->queue.empty(); });
    if (stream->queue.empty()) break;
    Operation& operation = stream->queue.front();
    stream->clock.join(operation.host_clock);
    stream->clock.set(stream->owner, operation.epoch);
    if (operation.is_run_when_lost || !is_lost(sim, *stream)) {
      operation.run(lock, *stream, operation);
    }
    stream->completed_clock = stream->clock;
    ++stream->completed;
    stream->queue.pop_front();
    sim.changed.notify_all();
  }
  stream->is_ended = true;
  sim.changed.notify_all();
}

bool touches(const Operation& operation, uint64_t address, uint64_t bytes) {
  return std::any_of(operation.touched.begin(), operation.touched.end(), [&](const Touched& range) {
    return range.address < address + bytes && address < range.address + range.bytes;
  });
}

}  // namespace

bool is_lost(const Simulation& sim, const StreamState& stream) {
  return sim.is_abandoning || stream.device->sticky != cuda::kSuccess;
}

void pause(std::unique_lock<std::mutex>& lock, std::chrono::microseconds* length) {
  lock.unlock();
  std::this_thread::sleep_for(*length);
  lock.lock();
  *length = std::min(2 * *length, kPauseMax);
}

uint64_t stream_number(uint64_t id) { return 0x5300'0000'0000 + id * 64; }
uint64_t event_number(uint64_t id) { return 0x4500'0000'0000 + id * 64; }

std::shared_ptr<StreamState> Streams::start(Simulation& sim, Device& device) {
  auto stream = std::make_shared<StreamState>();
  stream->id = next_id_++;
  stream->device = &device;
  stream->owner = sim.races.new_owner();
  stream->thread = std::thread([&sim, stream] { run_stream(sim, stream); });
  all_.push_back(stream);
  return stream;
}

std::shared_ptr<StreamState> Streams::create(Simulation& sim, Device& device) {
  if (all_.size() >= kStreamsMax) return nullptr;
  auto stream = start(sim, device);
  live_[stream_number(stream->id)] = stream;
  return stream;
}

std::shared_ptr<StreamState> Streams::find(Call& call, cuda::Stream handle) {
  const uint64_t number = number_of(handle);
  if (number <= kSpecialStreamMax) {
    call->convictions.add("null_stream", std::string(call.symbol()) + " on the NULL stream");
    std::shared_ptr<StreamState>& legacy = call.device().legacy_stream;
    if (legacy == nullptr) legacy = start(*call.operator->(), call.device());
    return legacy;
  }
  const auto found = live_.find(number);
  return found == live_.end() ? nullptr : found->second;
}

void Streams::destroy(Simulation& sim, cuda::Stream handle, std::unique_lock<std::mutex>& lock) {
  const auto found = live_.find(number_of(handle));
  const std::shared_ptr<StreamState> stream = found->second;
  live_.erase(found);
  stream->is_stopping = true;
  stream->work.notify_all();
  // With nothing left to do it ends at once, and is gone when the call returns.
  if (stream->queue.empty()) sim.changed.wait(lock, [&] { return stream->is_ended; });
  reap(lock);
}

void Streams::reap(std::unique_lock<std::mutex>& lock) {
  std::vector<std::shared_ptr<StreamState>> ended;
  const auto first = std::partition(all_.begin(), all_.end(),
                                    [](const auto& stream) { return !stream->is_ended; });
  std::move(first, all_.end(), std::back_inserter(ended));
  all_.erase(first, all_.end());
  lock.unlock();
  for (const auto& stream : ended) stream->thread.join();
  lock.lock();
}

void Streams::reset(Simulation& sim, std::unique_lock<std::mutex>& lock) {
  for (const auto& stream : all_) {
    stream->is_stopping = true;
    stream->work.notify_all();
  }
  sim.changed.notify_all();
  sim.changed.wait(lock, [&] {
    return std::all_of(all_.begin(), all_.end(), [](const auto& s) { return s->is_ended; });
  });
  reap(lock);
  live_.clear();
  events.clear();
}

// The oldest operation of each stream knows least of all that is to come on it.
void Streams::forget_old(Simulation& sim) {
  std::vector<VectorClock> known;
  for (const auto& stream : all_) {
    if (stream->queue.empty()) continue;
    known.push_back(stream->clock);
    known.back().join(stream->queue.front().host_clock);
  }
  sim.races.forget(known);
}

Operation& Streams::enqueue(Simulation& sim, StreamState& stream, Operation operation) {
  operation.label.number = next_operation_++;
  operation.label.stream = stream.id;
  operation.epoch = stream.next_epoch++;
  operation.host_clock = sim.races.host;
  if (sim.races.is_large()) forget_old(sim);
  ++stream.enqueued;
  stream.queue.push_back(std::move(operation));
  stream.work.notify_one();
  return stream.queue.back();
}

bool Streams::wait_until_untouched(Simulation& sim, std::unique_lock<std::mutex>& lock,
                                   uint64_t address, uint64_t bytes) {
  bool has_touched = false;
  const auto is_busy = [&] {
    bool is_waiting = false;
    for (const auto& stream : all_) {
      for (const Operation& operation : stream->queue) {
        const bool is_touching = touches(operation, address, bytes);
        has_touched = has_touched || is_touching;
        is_waiting = is_waiting || is_touching || operation.is_kernel;
      }
    }
    return is_waiting;
  };
  sim.changed.wait(lock, [&] { return !is_busy(); });
  return has_touched;
}

std::shared_ptr<EventState> Streams::create_event(Device& device, unsigned flags) {
  auto event = std::make_shared<EventState>();
  event->id = next_event_++;
  event->device = &device;
  event->flags = flags;
  events[event_number(event->id)] = event;
  return event;
}

std::shared_ptr<EventState> Streams::find(cuda::Event handle) const {
  const auto found = events.find(number_of(handle));
  return found == events.end() ? nullptr : found->second;
}

}  // namespace kvx::sim
