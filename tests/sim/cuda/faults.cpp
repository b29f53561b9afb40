#include "faults.h"

#include <cstdio>
#include <iterator>

namespace kvx::sim {

namespace {

constexpr size_t kConvictionsMax = 1000;

}  // namespace

std::string Label::text() const {
  if (stream == 0) return std::string(symbol) + " on the host";
  return std::string(symbol) + " #" + std::to_string(number) + " on stream " +
         std::to_string(stream);
}

std::string range_text(uint64_t address, uint64_t bytes) {
  char text[64];
  std::snprintf(text, sizeof text, "[0x%llx, +%llu)", static_cast<unsigned long long>(address),
                static_cast<unsigned long long>(bytes));
  return text;
}

void Convictions::add(std::string_view kind, std::string text) {
  if (convictions_.size() >= kConvictionsMax) return;
  convictions_.push_back({std::string(kind), std::move(text)});
}

void Faults::inject(std::string symbol, uint64_t nth, Failure failure) {
  injected_.emplace(std::move(symbol), Injected{nth, failure});
}

void Faults::delay(const std::string& symbol, std::chrono::microseconds delay) {
  if (delay.count() == 0) {
    delays_.erase(symbol);
  } else {
    delays_[symbol] = delay;
  }
}

void Faults::clear() {
  injected_.clear();
  delays_.clear();
}

Failure Faults::next(std::string_view symbol) {
  Failure failure;
  auto [at, end] = injected_.equal_range(symbol);
  while (at != end) {
    if (--at->second.calls_left > 0) {
      ++at;
      continue;
    }
    failure = at->second.failure;
    at = injected_.erase(at);
  }
  return failure;
}

std::chrono::microseconds Faults::delay_of(std::string_view symbol) const {
  const auto found = delays_.find(symbol);
  return found == delays_.end() ? std::chrono::microseconds(0) : found->second;
}

bool is_sticky_error(Result result) {
  return result == cuda::kErrorIllegalAddress || result == cuda::kErrorLaunchFailed ||
         result == cuda::kErrorEccUncorrectable;
}

}  // namespace kvx::sim
