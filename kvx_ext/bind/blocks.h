// Blocks as Python gives them: (n, 4) int64 rows of offset, stride, count and bytes.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <span>
#include <vector>

#include "kvx/descriptor.h"

namespace kvx::bind {

using Blocks = nanobind::ndarray<const int64_t, nanobind::shape<-1, 4>, nanobind::c_contig,
                                 nanobind::device::cpu>;

// REQUIRES: the array lives as long.
inline std::span<const Descriptor> rows_of(const Blocks& blocks) {
  static_assert(sizeof(Descriptor) == 4 * sizeof(int64_t));
  return {reinterpret_cast<const Descriptor*>(blocks.data()), blocks.shape(0)};
}

inline std::vector<Descriptor> blocks_of(const Blocks& blocks) {
  const std::span<const Descriptor> rows = rows_of(blocks);
  return {rows.begin(), rows.end()};
}

}  // namespace kvx::bind
