// Directions and calibrations as Python gives them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <string>

#include "kvx/device.h"

namespace kvx::bind {

using Rates = nanobind::ndarray<const double,
                                nanobind::shape<kCopyDirections, kCopyMethods, kCalibratedSizes>,
                                nanobind::c_contig, nanobind::device::cpu>;
using PlainRates = nanobind::ndarray<const double, nanobind::shape<kCopyDirections>,
                                     nanobind::c_contig, nanobind::device::cpu>;

// Raises UsageError for any other name than those of copy_direction_name().
CopyDirection direction_named(const std::string& name);

CopyCalibration calibration_of(const std::optional<Rates>& rates,
                               const std::optional<PlainRates>& plain);

// Raises UsageError for any other `sm` than "auto" and "never".
CopyOptions copy_options(const std::string& sm, int ctas, int64_t staging_bytes,
                         const std::optional<Rates>& calibration,
                         const std::optional<PlainRates>& plain);

// The counters by name.
nanobind::dict stats_dict(const CopyStats& stats);

}  // namespace kvx::bind
