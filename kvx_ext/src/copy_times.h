// predicted_copy_ns() for all methods in one go. See copy_plan.h.
#pragma once

#include <array>

#include "kvx/copy_plan.h"

namespace kvx {

using MethodTimes = std::array<double, kCopyMethods>;

[[nodiscard]] MethodTimes predicted_copy_times(const CopyCalibration& calibration,
                                               CopyDirection direction, size_t bytes);

}  // namespace kvx
