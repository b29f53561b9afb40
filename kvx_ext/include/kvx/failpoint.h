// Faults on purpose, for tests: rules that say which file operation goes wrong, how and how often.
//
// A Failpoints is shared by a test and by the decorator that make_faulty() puts around a backend;
// rules may change while I/O runs. Everything random comes from a rule's seed.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string_view>
#include <vector>

#include "kvx/backend.h"

namespace kvx {

// kAny is any file operation; kCopy is one block on a copy thread.
enum class FaultTarget : uint8_t { kRead, kWrite, kSync, kAny, kCopy };

enum class FaultAction : uint8_t {
  kEio,     // kStorage with EIO, nothing moves
  kEnospc,  // kStorage with ENOSPC, nothing moves
  kShort,   // reads, writes: half of the bytes move, then kShort
  kDelay,   // starts `delay_s` late
  kHang,    // does not start until clear(); cancel() and close() end it, unless `ignores_cancel`
  kTorn,    // writes: some 512-byte sectors are written, others keep what they held, then kOk
  kFlip,    // reads, writes: one bit is wrong, then kOk
  kDrop,    // nothing moves, then kOk
};
inline constexpr size_t kFaultActions = 8;

struct FaultRule {
  FaultTarget target = FaultTarget::kAny;
  FaultAction action = FaultAction::kEio;
  int64_t after = 0;   // matching operations that pass before the rule begins
  int64_t count = -1;  // operations it spoils; -1: all
  double probability = 1.0;
  uint64_t seed = 0;
  double delay_s = 0.0;
  bool ignores_cancel = false;      // kHang: stays stuck as real hardware does
  bool torn_reports_error = false;  // kTorn: then kStorage with EIO
};

// One rule that hit, and the random number that decides which bit or sectors.
struct Fault {
  FaultRule rule;
  uint64_t random = 0;
};

class FaultListener {
 public:
  virtual ~FaultListener() = default;
  virtual void release() = 0;
};

// Thread-safe.
class Failpoints {
 public:
  // A rule for the same target and action replaces the older one. kUsage: a value out of range, or
  // an action that its target cannot show (a torn read).
  Status set(const FaultRule& rule);

  // Drops all rules and lets everything that hangs go on. Counters stay.
  void clear();

  // Decides about one operation: the first rule that hits wins, in the order they were set.
  std::optional<Fault> next(IoKind kind);
  // The same for a copy: kDelay, kHang (until clear(); nothing else ends it) and kFlip.
  std::optional<Fault> next_copy();

  // Operations spoiled so far, by FaultAction.
  std::array<int64_t, kFaultActions> hits() const;

  void listen(std::weak_ptr<FaultListener> listener);

 private:
  std::optional<Fault> next(FaultTarget target);

  struct Armed {
    FaultRule rule;
    std::mt19937_64 random;
    int64_t seen = 0;
    int64_t spoiled = 0;
  };

  mutable std::mutex mutex_;
  std::vector<Armed> rules_;                             // mutex_
  std::vector<std::weak_ptr<FaultListener>> listeners_;  // mutex_
  std::array<int64_t, kFaultActions> hits_{};            // mutex_
};

// "read", "write", "sync", "any", "copy"; "eio", "enospc", "short", "delay", "hang", "torn",
// "flip", "drop".
Status parse_fault_target(std::string_view name, FaultTarget* target);
Status parse_fault_action(std::string_view name, FaultAction* action);
std::string_view fault_action_name(FaultAction action);

// Delays and hangs wait on a timer of the decorator, never on a thread of the inner backend.
Status make_faulty(const BackendFactory& inner, std::shared_ptr<Failpoints> failpoints, IoSink sink,
                   std::unique_ptr<IoBackend>* backend);

}  // namespace kvx
