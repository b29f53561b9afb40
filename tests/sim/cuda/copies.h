// Operations that move bytes: where the bytes lie, the engine that they occupy, and what they do to
// memory meanwhile. Guarded by Simulation::mutex but for the bytes themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "devices.h"
#include "memory.h"
#include "simulation.h"
#include "streams.h"

namespace kvx::sim {

// What a target holds while a copy to it runs.
inline constexpr uint8_t kPoison = 0xCB;

enum class Place { kDevice, kPinned, kPageable };

// One end of a copy. Keeps device memory mapped until the copy is over.
struct CopySide {
  uint64_t address = 0;
  uint8_t* bytes = nullptr;
  Place place = Place::kPageable;
  std::shared_ptr<Reservation> memory;
};

struct CopyPart {
  CopySide source;
  CopySide target;
  size_t bytes = 0;
  int source_order = cuda::kSourceOrderStream;
  // The source as it was at the call; for the orders that allow to read it then.
  std::vector<uint8_t> snapshot;
};

// Finds the bytes of an address range as the device may use it. A wrong device address is 700 and a
// conviction, host memory in two registrations is an invalid value and one.
Result resolve(Call& call, uint64_t address, size_t bytes, CopySide* side);
Result resolve(Call& call, uint64_t target, uint64_t source, size_t bytes, CopyPart* part);

// Memory is about to go away: convicts who still uses it, then waits for that to end.
void quiesce(Call& call, uint64_t address, size_t bytes);

// Queues one operation that runs all parts, in an order drawn from the seed when it is a batch.
void enqueue_copies(Call& call, StreamState& stream, std::vector<CopyPart> parts, bool is_batch);

// Occupies an engine of the stream's device while it lives. Waits for its turn.
class EngineUse {
 public:
  EngineUse(Simulation& sim, StreamState& stream, Engine engine,
            std::unique_lock<std::mutex>& lock);
  ~EngineUse();
  EngineUse(const EngineUse&) = delete;
  EngineUse& operator=(const EngineUse&) = delete;

  // Takes as long as so many bytes do, and for as long as the engine is frozen. False when the
  // context was lost meanwhile: then nothing may be written any more.
  [[nodiscard]] bool spend(size_t bytes, bool has_latency);

 private:
  Simulation& sim_;
  StreamState& stream_;
  Engine engine_;
  EngineState& state_;
  std::unique_lock<std::mutex>& lock_;
};

}  // namespace kvx::sim
