// Which bytes of a region a block consists of: rows at a stride, and lists of such blocks.
//
// A descriptor is `count` rows of `bytes` each, the first at `offset` of its region, the next one
// `stride` further. Its canonical bytes are its rows one after the other; two descriptors fit each
// other when their totals agree, whatever their strides.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvx/status.h"

namespace kvx {

// No list may be longer; an index travels as 32 bits.
inline constexpr int64_t kDescriptorsMax = int64_t{1} << 20;

struct Descriptor {
  int64_t offset = 0;
  int64_t stride = 0;  // of no meaning when count is 1
  int64_t count = 1;
  int64_t bytes = 0;  // of one row

  int64_t total() const { return count * bytes; }
  // First byte behind the last row.
  int64_t end() const { return offset + (count - 1) * stride + bytes; }
};

// kUsage naming the first descriptor that is not of positive size, has overlapping rows, or does
// not lie within `region_bytes`. Safe for any values, also those a peer made up.
Status validate(std::span<const Descriptor> descriptors, int64_t region_bytes);

// kUsage naming the first block whose totals differ between the two sides.
Status validate_fit(std::span<const Descriptor> local, std::span<const Descriptor> remote);

// A run of contiguous bytes of a region, within one block.
struct Run {
  int64_t offset = 0;
  int64_t bytes = 0;  // 0: past the last block
};

// Walks the canonical bytes of a list from front to back. REQUIRES: the list outlives the walk and
// was validated.
class RowCursor {
 public:
  explicit RowCursor(std::span<const Descriptor> descriptors) : descriptors_(descriptors) {}

  // The next contiguous run of at most `bytes_max`; never crosses a row.
  Run next(int64_t bytes_max);
  // The block the next run belongs to; the number of blocks when there is none.
  int64_t block() const { return block_; }
  // Canonical bytes of that block which were walked already.
  int64_t done_in_block() const { return row_ * row_bytes() + done_in_row_; }
  bool is_at_end() const { return block_ == static_cast<int64_t>(descriptors_.size()); }

 private:
  int64_t row_bytes() const {
    return is_at_end() ? 0 : descriptors_[static_cast<size_t>(block_)].bytes;
  }

  std::span<const Descriptor> descriptors_;
  int64_t block_ = 0;
  int64_t row_ = 0;
  int64_t done_in_row_ = 0;
};

}  // namespace kvx
