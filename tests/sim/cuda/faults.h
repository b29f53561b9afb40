// What goes wrong on purpose (injected failures), what went wrong by the caller's fault
// (convictions), and what was counted meanwhile. Everything is guarded by Simulation::mutex.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "shim/cuda/abi.h"

namespace kvx::sim {

using cuda::Result;

// An operation as convictions name it: "cuMemcpyAsync #12 on stream 3".
struct Label {
  const char* symbol = "";
  uint64_t number = 0;
  uint64_t stream = 0;  // 0: the host itself

  [[nodiscard]] std::string text() const;
};

std::string range_text(uint64_t address, uint64_t bytes);

struct Conviction {
  std::string kind;
  std::string text;
};

class Convictions {
 public:
  // Drops what comes after the first thousand: one mistake in a loop is one mistake.
  void add(std::string_view kind, std::string text);
  void clear() { convictions_.clear(); }
  [[nodiscard]] const std::vector<Conviction>& all() const { return convictions_; }

 private:
  std::vector<Conviction> convictions_;
};

struct Failure {
  Result result = cuda::kSuccess;
  bool is_sticky = false;
};

class Faults {
 public:
  // Fails the nth call from now on of `symbol`; 1 is the next one.
  void inject(std::string symbol, uint64_t nth, Failure failure);
  // Makes every call of `symbol` take this long; 0 ends it.
  void delay(const std::string& symbol, std::chrono::microseconds delay);
  void clear();

  // Counts a call; the failure it is to have.
  Failure next(std::string_view symbol);
  [[nodiscard]] std::chrono::microseconds delay_of(std::string_view symbol) const;

 private:
  struct Injected {
    uint64_t calls_left = 0;
    Failure failure;
  };
  std::multimap<std::string, Injected, std::less<>> injected_;
  std::map<std::string, std::chrono::microseconds, std::less<>> delays_;
};

// True for the errors after which a real context is lost.
bool is_sticky_error(Result result);

struct Counters {
  uint64_t launches = 0;
  uint64_t copies = 0;
  uint64_t batch_calls = 0;
  uint64_t pageable_copies = 0;
  uint64_t bytes_h2d = 0;
  uint64_t bytes_d2h = 0;
  uint64_t bytes_d2d = 0;
};

}  // namespace kvx::sim
