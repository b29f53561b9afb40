// How a list of runs is best copied: a pure decision from a calibration of the device.
//
//   CopyRuns runs;                       // what is to go where, as given
//   CopyPlan plan;
//   plan_copies(CopyDirection::kHostToDevice, runs, calibration, limits, &plan);
//   for (const CopyCall& call : plan.calls) ...    // what to ask of the driver, in this order
//
// The driver never merges neighbours, so the plan does: runs that touch on both sides become one.
// What is left is copied by one of four methods. Nothing here allocates once its vectors have
// grown: plan into the same CopyPlan again and again.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace kvx {

enum class CopyDirection : uint8_t { kHostToDevice, kDeviceToHost, kDeviceToDevice };
inline constexpr size_t kCopyDirections = 3;
// "h2d", "d2h", "d2d"
[[nodiscard]] std::string_view copy_direction_name(CopyDirection direction);

enum class CopyMethod : uint8_t {
  kBatch,   // one cuMemcpyBatchAsync for all runs
  kRows,    // cuMemcpy2DAsync: equal runs at equal strides on both sides
  kSingle,  // one cuMemcpyAsync a run
  kStaged,  // one contiguous copy through device memory, scattered or gathered by a kernel
};
inline constexpr size_t kCopyMethods = 4;
// "batch", "rows", "single", "staged"
[[nodiscard]] std::string_view copy_method_name(CopyMethod method);

// Parallel arrays, as the driver wants them. Addresses are host or device, by the direction.
struct CopyRuns {
  std::vector<uint64_t> targets;
  std::vector<uint64_t> sources;
  std::vector<size_t> bytes;

  size_t size() const { return bytes.size(); }
  void add(uint64_t target, uint64_t source, size_t run_bytes) {
    targets.push_back(target);
    sources.push_back(source);
    bytes.push_back(run_bytes);
  }
  void clear();
};

// Measured once a device: GB/s of each method by fragment size (powers of two from 4 KiB to 4 MiB),
// and of a plain large copy. Zero: not measured, or not there. A direction that is all zeros is
// planned with the defaults, which are published numbers of an H100 and only a start.
inline constexpr size_t kCalibratedSizes = 11;  // 4 KiB << i
struct CopyCalibration {
  std::array<double, kCopyDirections> plain_gb_s{};
  std::array<std::array<std::array<double, kCalibratedSizes>, kCopyMethods>, kCopyDirections>
      gb_s{};
  static CopyCalibration defaults();
};

// What one run of `bytes` takes by `method`, in ns; infinite where the method was not measured. The
// rate is linear in the logarithm of the size between two measured ones; below 4 KiB a run takes as
// long as one of 4 KiB, above 4 MiB it is as fast as a plain copy.
[[nodiscard]] double predicted_copy_ns(const CopyCalibration& calibration, CopyDirection direction,
                                       CopyMethod method, size_t bytes);
// What a call costs besides. A batch and single copies have it in their rates. A staged call waits
// for its copy and launches a kernel: published break-even lies at 16 runs of 8 KiB.
inline constexpr double kRowsCallNs = 2'000;
inline constexpr double kStagedCallNs = 20'000;

struct CopyLimits {
  bool has_batch = true;
  bool has_kernels = false;       // false with `sm: never`
  int64_t staging_bytes = 0;      // of device memory for kStaged; a call uses at most half of it
  int64_t batch_runs_max = 8192;  // of one driver call
  // Host registrations: a run is cut where it would cross a multiple of `piece_bytes` counted from
  // the base of the range it lies in, and where it would enter or leave one. Sorted by base,
  // without overlap; zero piece_bytes: one piece.
  struct PinnedSpan {
    uint64_t base = 0;
    uint64_t bytes = 0;
    uint64_t piece_bytes = 0;
  };
  std::span<const PinnedSpan> pinned;
};

// Runs [first, first + count) of the plan's merged runs go by `method`. kRows: `count` rows with
// these strides, each at least a row and at most kRowStrideMax. kStaged: they are contiguous on the
// host side, so `bytes` there is one copy; never between devices. All runs of one kRows or kStaged
// call lie in one piece of pinned memory. A run on its own is kSingle.
inline constexpr int64_t kRowStrideMax = (int64_t{1} << 31) - 1;  // the driver's largest pitch
struct CopyCall {
  CopyMethod method = CopyMethod::kBatch;
  size_t first = 0;
  size_t count = 0;
  int64_t target_stride = 0;
  int64_t source_stride = 0;
  size_t bytes = 0;  // in all
};

struct CopyPlan {
  CopyRuns runs;                // merged and cut
  std::vector<CopyCall> calls;  // together every run, in the order of `runs`
  size_t total_bytes = 0;

  // What the planner works in; kept so that it allocates nothing the next time.
  struct Scratch {
    struct Run {
      uint64_t target, source;
      size_t bytes;
    };
    CopyRuns runs;
    std::vector<Run> sorted;
    std::vector<uint64_t> bits;
  };
  Scratch scratch;
};

// The method of a run is decided by its size: large ones of a mixed list go by batch, small ones
// staged. Equal runs at equal strides become rows, runs contiguous on the host side one staged
// call, wherever that is predicted to be faster. The order given is kept within a call, unless
// sorting would merge at least a quarter of the runs, or make small ones contiguous on the host
// side.
//
// REQUIRES: no run is empty; no two targets overlap, and no target overlaps a source. Calls may
// then be executed in any order.
void plan_copies(CopyDirection direction, const CopyRuns& runs, const CopyCalibration& calibration,
                 const CopyLimits& limits, CopyPlan* plan);

}  // namespace kvx
