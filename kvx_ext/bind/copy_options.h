// Options for copies as Python gives them.
#pragma once

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <string>

#include "bind.h"
#include "kvx/device.h"

namespace kvx::bind {

// GB/s by direction, method and size, and of plain copies by direction; see CopyCalibration.
using Rates = nanobind::ndarray<const double,
                                nanobind::shape<kCopyDirections, kCopyMethods, kCalibratedSizes>,
                                nanobind::c_contig, nanobind::device::cpu>;
using PlainRates = nanobind::ndarray<const double, nanobind::shape<kCopyDirections>,
                                     nanobind::c_contig, nanobind::device::cpu>;

inline CopyCalibration calibration_of(const std::optional<Rates>& rates,
                                      const std::optional<PlainRates>& plain) {
  CopyCalibration made;
  if (rates) std::copy_n(rates->data(), rates->size(), &made.gb_s[0][0][0]);
  if (plain) std::copy_n(plain->data(), plain->size(), made.plain_gb_s.data());
  return made;
}

inline CopyOptions copy_options(const std::string& sm, int ctas, int64_t staging_bytes,
                                const std::optional<Rates>& rates,
                                const std::optional<PlainRates>& plain) {
  if (sm != "auto" && sm != "never") {
    raise_if_error({Code::kUsage, "sm is \"auto\" or \"never\", not \"" + sm + "\""});
  }
  if (ctas < 1) raise_if_error({Code::kUsage, "a kernel needs at least one thread block"});
  if (staging_bytes < 0) raise_if_error({Code::kUsage, "staging_bytes is negative"});
  return {.sm = sm == "never" ? SmUse::kNever : SmUse::kAuto,
          .ctas = ctas,
          .staging_bytes = staging_bytes,
          .calibration = calibration_of(rates, plain)};
}

}  // namespace kvx::bind
