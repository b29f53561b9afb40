#include "copies.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

namespace kvx::sim {

namespace {

using cuda::kSuccess;

Engine engine_of(const CopyPart& part) {
  const bool is_from_device = part.source.place == Place::kDevice;
  const bool is_to_device = part.target.place == Place::kDevice;
  if (is_from_device == is_to_device) return Engine::kOnDevice;
  return is_to_device ? Engine::kHostToDevice : Engine::kDeviceToHost;
}

bool is_overlapping(const CopyPart& part) {
  return part.source.bytes < part.target.bytes + part.bytes &&
         part.target.bytes < part.source.bytes + part.bytes;
}

void count_bytes(Counters& counters, Engine engine, size_t bytes) {
  switch (engine) {
    case Engine::kHostToDevice:
      counters.bytes_h2d += bytes;
      break;
    case Engine::kDeviceToHost:
      counters.bytes_d2h += bytes;
      break;
    case Engine::kOnDevice:
      counters.bytes_d2d += bytes;
      break;
  }
}

// The parts of one operation while it runs.
class CopyRun {
 public:
  CopyRun(Simulation& sim, std::vector<CopyPart> parts, std::vector<size_t> order)
      : sim_(sim), parts_(std::move(parts)), order_(std::move(order)) {}

  [[nodiscard]] const std::vector<CopyPart>& parts() const { return parts_; }

  void run(std::unique_lock<std::mutex>& lock, StreamState& stream, const Operation& operation) {
    note_accesses(stream, operation);
    lock.unlock();
    for (const CopyPart& part : parts_) {
      if (!is_overlapping(part)) std::memset(part.target.bytes, kPoison, part.bytes);
    }
    lock.lock();
    bool has_latency = true;
    for (const size_t index : order_) {
      const CopyPart& part = parts_[index];
      EngineUse use(sim_, stream, engine_of(part), lock);
      if (!use.spend(part.bytes, has_latency)) return;
      has_latency = false;
      move(part, lock);
    }
  }

 private:
  void note_accesses(const StreamState& stream, const Operation& operation) {
    for (size_t i = 0; i < parts_.size(); ++i) {
      const CopyPart& part = parts_[i];
      Access access{part.source.address,
                    part.source.address + part.bytes,
                    false,
                    stream.owner,
                    operation.epoch,
                    operation.label,
                    false};
      if (part.source_order == cuda::kSourceOrderStream) {
        sim_.races.add(access, stream.clock, sim_.convictions);
      }
      access.start = part.target.address;
      access.end = access.start + part.bytes;
      access.is_write = true;
      sim_.races.add(access, stream.clock, sim_.convictions);
    }
  }

  // The source is read as late as possible: at the end.
  void move(const CopyPart& part, std::unique_lock<std::mutex>& lock) {
    lock.unlock();
    const bool has_snapshot = part.source_order != cuda::kSourceOrderStream;
    const uint8_t* source = has_snapshot ? part.snapshot.data() : part.source.bytes;
    std::memmove(part.target.bytes, source, part.bytes);
    lock.lock();
    count_bytes(sim_.counters, engine_of(part), part.bytes);
  }

  Simulation& sim_;
  std::vector<CopyPart> parts_;
  std::vector<size_t> order_;
};

void take_snapshots(std::vector<CopyPart>& parts) {
  for (CopyPart& part : parts) {
    if (part.source_order == cuda::kSourceOrderStream) continue;
    part.snapshot.assign(part.source.bytes, part.source.bytes + part.bytes);
  }
}

// A source that may be read before the stream gets there is read at the call: what the host does
// not know to be finished by then is not ordered before it.
void note_early_reads(Call& call, const StreamState& stream, const Operation& operation,
                      const std::vector<CopyPart>& parts) {
  for (size_t i = 0; i < parts.size(); ++i) {
    const CopyPart& part = parts[i];
    if (part.source_order == cuda::kSourceOrderDuringCall) {
      call->races.add_host(part.source.address, part.bytes, false, call.symbol(),
                           call->convictions);
    } else if (part.source_order == cuda::kSourceOrderAny) {
      const Access access{part.source.address,
                          part.source.address + part.bytes,
                          false,
                          stream.owner,
                          operation.epoch,
                          operation.label,
                          false};
      call->races.add(access, call->races.host, call->convictions);
    }
  }
}

Result resolve_device(Call& call, uint64_t address, size_t bytes, CopySide* side) {
  auto memory = call->memory.find(address);
  const std::string range = range_text(address, bytes);
  if (memory == nullptr) return call.illegal_address("illegal_address", range + " is no memory");
  const size_t offset = address - memory->address;
  if (!memory->is_mapped(offset, bytes)) {
    return call.illegal_address("illegal_address", range + " is not all memory");
  }
  if (!memory->is_accessible(offset, bytes, call.device().ordinal)) {
    return call.illegal_address("no_access", range + " has no access set");
  }
  side->bytes = memory->alias + offset;
  side->place = Place::kDevice;
  side->memory = std::move(memory);
  return kSuccess;
}

}  // namespace

Result resolve(Call& call, uint64_t address, size_t bytes, CopySide* side) {
  side->address = address;
  if (call->memory.is_device_address(address)) return resolve_device(call, address, bytes, side);
  const std::string range = range_text(address, bytes);
  const Registration* registration = call->memory.registration_in(address, bytes);
  if (registration != nullptr) {
    const bool is_within = registration->address <= address &&
                           address + bytes <= registration->address + registration->bytes;
    if (!is_within) {
      call->convictions.add("spans_registrations", std::string(call.symbol()) + ": " + range +
                                                       " is not in one registration");
      return cuda::kErrorInvalidValue;
    }
    side->place = Place::kPinned;
  } else if (!is_host_memory(address, bytes)) {
    return call.illegal_address("illegal_address", range + " is no memory");
  }
  side->bytes = reinterpret_cast<uint8_t*>(address);
  return kSuccess;
}

Result resolve(Call& call, uint64_t target, uint64_t source, size_t bytes, CopyPart* part) {
  part->bytes = bytes;
  const Result result = resolve(call, source, bytes, &part->source);
  return result != kSuccess ? result : resolve(call, target, bytes, &part->target);
}

void enqueue_copies(Call& call, StreamState& stream, std::vector<CopyPart> parts, bool is_batch) {
  Simulation& sim = *call.operator->();
  sim.counters.copies += parts.size();
  Operation operation;
  operation.label.symbol = call.symbol();
  for (const CopyPart& part : parts) {
    const bool is_pageable =
        part.source.place == Place::kPageable || part.target.place == Place::kPageable;
    if (is_pageable) ++sim.counters.pageable_copies;
    operation.touched.push_back({part.target.address, part.bytes});
    if (part.source_order == cuda::kSourceOrderDuringCall) continue;
    operation.touched.push_back({part.source.address, part.bytes});
  }
  take_snapshots(parts);
  // Only a batch is free to run its copies in any order.
  std::vector<size_t> order(parts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  if (is_batch) {
    std::mt19937_64 random(sim.shuffle_seed + sim.counters.batch_calls);
    std::shuffle(order.begin(), order.end(), random);
  }
  const auto run = std::make_shared<CopyRun>(sim, std::move(parts), std::move(order));
  operation.run = [run](auto& lock, StreamState& on, const Operation& running) {
    run->run(lock, on, running);
  };
  const Operation& queued = sim.streams.enqueue(sim, stream, std::move(operation));
  note_early_reads(call, stream, queued, run->parts());
}

EngineUse::EngineUse(Simulation& sim, StreamState& stream, Engine engine,
                     std::unique_lock<std::mutex>& lock)
    : sim_(sim),
      stream_(stream),
      engine_(engine),
      state_(stream.device->engines[static_cast<size_t>(engine)]),
      lock_(lock) {
  ++state_.waiting;
  sim_.changed.wait(lock_, [this] { return !state_.is_busy; });
  --state_.waiting;
  state_.is_busy = true;
}

EngineUse::~EngineUse() {
  state_.is_busy = false;
  if (state_.waiting > 0) sim_.changed.notify_all();
}

bool EngineUse::spend(size_t bytes, bool has_latency) {
  const auto& settings = sim_.devices.engines[static_cast<size_t>(engine_)];
  std::chrono::nanoseconds time(0);
  if (has_latency) time += settings.latency;
  if (settings.bytes_per_s > 0) {
    time += std::chrono::nanoseconds(static_cast<int64_t>(
        static_cast<double>(bytes) * 1e9 / static_cast<double>(settings.bytes_per_s)));
  }
  const auto has_ended = [this] { return is_lost(sim_, stream_); };
  if (time.count() > 0) {
    const auto until = std::chrono::steady_clock::now() + time;
    sim_.changed.wait_until(lock_, until, has_ended);
  }
  sim_.changed.wait(lock_, [&] { return !settings.is_frozen || has_ended(); });
  return !has_ended();
}

}  // namespace kvx::sim
