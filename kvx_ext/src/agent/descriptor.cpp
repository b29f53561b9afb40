#include "kvx/descriptor.h"

#include <algorithm>
#include <string>

namespace kvx {

namespace {

std::string name_of(size_t index) { return "descriptor " + std::to_string(index); }

// Why a descriptor cannot be used; null if it can. Compares by subtraction and division of what is
// known to be in range, so no value overflows.
const char* defect_of(const Descriptor& descriptor, int64_t region_bytes) {
  if (descriptor.count <= 0 || descriptor.bytes <= 0) return "is not of positive size";
  const bool has_rows = descriptor.count > 1;
  if (has_rows && descriptor.stride < descriptor.bytes) return "has overlapping rows";
  if (descriptor.offset < 0 || descriptor.offset > region_bytes) return "begins outside";
  const int64_t room = region_bytes - descriptor.offset;
  if (descriptor.bytes > room) return "ends outside";
  if (has_rows && descriptor.count - 1 > (room - descriptor.bytes) / descriptor.stride) {
    return "ends outside";
  }
  return nullptr;
}

}  // namespace

Status validate(std::span<const Descriptor> descriptors, int64_t region_bytes) {
  if (std::cmp_greater(descriptors.size(), kDescriptorsMax)) {
    return {Code::kUsage, std::to_string(descriptors.size()) + " descriptors; at most " +
                              std::to_string(kDescriptorsMax) + " fit one transfer: split it"};
  }
  for (size_t i = 0; i < descriptors.size(); ++i) {
    const Descriptor& bad = descriptors[i];
    const char* defect = defect_of(bad, region_bytes);
    if (defect == nullptr) continue;
    return {Code::kUsage, name_of(i) + " " + defect + ": offset " + std::to_string(bad.offset) +
                              ", stride " + std::to_string(bad.stride) + ", count " +
                              std::to_string(bad.count) + ", bytes " + std::to_string(bad.bytes) +
                              ", in a region of " + std::to_string(region_bytes) + " bytes"};
  }
  return Status::Ok();
}

Status validate_fit(std::span<const Descriptor> local, std::span<const Descriptor> remote) {
  if (local.size() != remote.size()) {
    return {Code::kUsage, std::to_string(local.size()) + " local descriptors for " +
                              std::to_string(remote.size()) + " remote ones"};
  }
  for (size_t i = 0; i < local.size(); ++i) {
    int64_t here = 0;
    int64_t there = 0;
    const bool is_huge = __builtin_mul_overflow(local[i].count, local[i].bytes, &here) ||
                         __builtin_mul_overflow(remote[i].count, remote[i].bytes, &there);
    if (!is_huge && here == there) continue;
    return {Code::kUsage,
            name_of(i) + (is_huge ? " has more bytes than can be counted"
                                  : " has " + std::to_string(here) + " bytes here and " +
                                        std::to_string(there) + " there")};
  }
  return Status::Ok();
}

Run RowCursor::next(int64_t bytes_max) {
  if (is_at_end()) return {};
  const Descriptor& descriptor = descriptors_[static_cast<size_t>(block_)];
  const int64_t bytes = std::min(bytes_max, descriptor.bytes - done_in_row_);
  const Run run{descriptor.offset + row_ * descriptor.stride + done_in_row_, bytes};
  done_in_row_ += bytes;
  if (done_in_row_ < descriptor.bytes) return run;
  done_in_row_ = 0;
  if (++row_ < descriptor.count) return run;
  row_ = 0;
  ++block_;
  return run;
}

}  // namespace kvx
