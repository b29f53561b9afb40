#include <algorithm>
#include <cmath>
#include <limits>

#include "copy_times.h"
#include "kvx/copy_plan.h"

namespace kvx {

namespace {

constexpr size_t kFirstLog2 = 12;  // 4 KiB

using Rates = std::array<double, kCalibratedSizes>;

// A call of `call_ns` for every run, and then the bytes at the plain rate.
Rates one_call_a_run(double call_ns, double plain_gb_s) {
  Rates rates{};
  for (size_t i = 0; i < kCalibratedSizes; ++i) {
    const double bytes = static_cast<double>(size_t{4096} << i);
    rates[i] = bytes / (call_ns + bytes / plain_gb_s);
  }
  return rates;
}

Rates flat(double gb_s) {
  Rates rates{};
  rates.fill(gb_s);
  return rates;
}

}  // namespace

std::string_view copy_direction_name(CopyDirection direction) {
  constexpr std::array<std::string_view, kCopyDirections> kNames = {"h2d", "d2h", "d2d"};
  return kNames[static_cast<size_t>(direction)];
}

std::string_view copy_method_name(CopyMethod method) {
  constexpr std::array<std::string_view, kCopyMethods> kNames = {"batch", "rows", "single",
                                                                 "staged"};
  return kNames[static_cast<size_t>(method)];
}

void CopyRuns::clear() {
  targets.clear();
  sources.clear();
  bytes.clear();
}

// Sources: vllm#42212 for batches to the device (4 KiB 4 GB/s, 16 KiB 6.3, 28 KiB 40, 64 KiB 51)
// and for the 2.3 us of a copy of its own FlexKV#193. Nobody published batches from the device or
// rows: the first are taken to have the same cliff, the second to be no faster than a batch. Staged
// is what a few CTAs reach of a plain copy. Between places of one device a copy engine makes 93
// GB/s.
CopyCalibration CopyCalibration::defaults() {
  constexpr Rates kBatch = {4, 5, 6.3, 42, 51, 52, 53, 53.5, 54, 54, 54};
  constexpr double kCallNs = 2300;
  constexpr std::array<double, kCopyDirections> kPlain = {55, 54, 93};
  CopyCalibration made;
  made.plain_gb_s = kPlain;
  for (size_t direction = 0; direction < kCopyDirections; ++direction) {
    const bool is_over_link = direction < static_cast<size_t>(CopyDirection::kDeviceToDevice);
    const double plain = kPlain[direction];
    Rates batch = is_over_link ? kBatch : one_call_a_run(500, plain);
    for (double& rate : batch) rate = std::min(rate, plain);
    auto& methods = made.gb_s[direction];
    methods[static_cast<size_t>(CopyMethod::kBatch)] = batch;
    methods[static_cast<size_t>(CopyMethod::kRows)] = batch;
    // Numbers of two sources: never let copies of their own beat the batch that replaces them.
    Rates& single = methods[static_cast<size_t>(CopyMethod::kSingle)];
    single = one_call_a_run(kCallNs, plain);
    for (size_t i = 0; i < kCalibratedSizes; ++i) single[i] = std::min(single[i], batch[i]);
    if (is_over_link) methods[static_cast<size_t>(CopyMethod::kStaged)] = flat(0.8 * plain);
  }
  return made;
}

MethodTimes predicted_copy_times(const CopyCalibration& calibration, CopyDirection direction,
                                 size_t bytes) {
  constexpr size_t kFirstBytes = size_t{1} << kFirstLog2;
  constexpr size_t kLastBytes = kFirstBytes << (kCalibratedSizes - 1);
  const auto& methods = calibration.gb_s[static_cast<size_t>(direction)];
  const double plain = calibration.plain_gb_s[static_cast<size_t>(direction)];
  const double size = static_cast<double>(std::max(bytes, kFirstBytes));
  const double place = std::log2(size) - static_cast<double>(kFirstLog2);
  const size_t below = std::min(static_cast<size_t>(place), kCalibratedSizes - 2);
  const double above = place - static_cast<double>(below);
  MethodTimes times{};
  for (size_t method = 0; method < kCopyMethods; ++method) {
    const Rates& rates = methods[method];
    const double low = rates[below], high = rates[below + 1];
    // Half measured is not measured: a method may end where its memory does.
    double rate = low == 0 || high == 0 ? 0 : low + above * (high - low);
    if (above == 0) rate = low;
    if (bytes >= kLastBytes) rate = rates.back();
    if (bytes > kLastBytes && rate != 0 && plain != 0) rate = plain;
    times[method] = rate > 0 ? size / rate : std::numeric_limits<double>::infinity();
  }
  return times;
}

double predicted_copy_ns(const CopyCalibration& calibration, CopyDirection direction,
                         CopyMethod method, size_t bytes) {
  return predicted_copy_times(calibration, direction, bytes)[static_cast<size_t>(method)];
}

}  // namespace kvx
