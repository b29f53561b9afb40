// The planner without Python: it allocates nothing the second time, and every random plan covers
// its list once. What it decides is tested in tests/transfer/test_copy_plan.py.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <random>

#include "check.h"
#include "kvx/copy_plan.h"

namespace {

size_t allocations = 0;

}  // namespace

// Not inlined, or the compiler takes new and free for a mismatched pair.
[[gnu::noinline]] void* operator new(size_t bytes) {
  ++allocations;
  if (void* made = std::malloc(bytes)) return made;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* made) noexcept { std::free(made); }
[[gnu::noinline]] void operator delete(void* made, size_t) noexcept { std::free(made); }

namespace {

using kvx::CopyCall;
using kvx::CopyDirection;
using kvx::CopyLimits;
using kvx::CopyPlan;
using kvx::CopyRuns;

constexpr uint64_t kHost = uint64_t{1} << 40;
constexpr uint64_t kDevice = uint64_t{1} << 44;

// Blocks of some planes, in a random order of one of three kinds.
CopyRuns random_runs(std::mt19937* random) {
  const auto pick = [random](size_t bound) { return (*random)() % bound; };
  const size_t planes = 1 + pick(40), blocks = 1 + pick(40), bytes = size_t{1} << (10 + pick(8));
  const size_t gap = pick(2), kind = pick(3);
  CopyRuns runs;
  for (size_t i = 0; i < planes * blocks; ++i) {
    const size_t plane = kind == 0 ? i % planes : i / blocks;
    const size_t block = kind == 0 ? i / planes : i % blocks;
    const size_t size = pick(20) == 0 ? bytes / 2 : bytes;
    runs.add(kDevice + (plane * 1000 + block * (1 + gap)) * bytes,
             kHost + (block * planes + plane) * bytes, size);
  }
  if (kind == 2) {
    for (size_t i = runs.size(); i-- > 1;) {
      const size_t other = pick(i + 1);
      std::swap(runs.targets[i], runs.targets[other]);
      std::swap(runs.sources[i], runs.sources[other]);
      std::swap(runs.bytes[i], runs.bytes[other]);
    }
  }
  return runs;
}

// Where every byte of the targets comes from, as sorted runs that cannot be merged further.
std::map<uint64_t, std::pair<uint64_t, size_t>> meaning(const CopyRuns& runs) {
  std::map<uint64_t, std::pair<uint64_t, size_t>> sorted, merged;
  for (size_t i = 0; i < runs.size(); ++i) {
    sorted[runs.targets[i]] = {runs.sources[i], runs.bytes[i]};
  }
  for (const auto& [target, run] : sorted) {
    if (!merged.empty()) {
      auto& [last, whole] = *merged.rbegin();
      if (last + whole.second == target && whole.first + whole.second == run.first) {
        whole.second += run.second;
        continue;
      }
    }
    merged[target] = run;
  }
  return merged;
}

void check_plan(const CopyRuns& runs, const CopyPlan& plan) {
  CHECK(meaning(runs) == meaning(plan.runs));
  size_t first = 0, total = 0;
  for (const CopyCall& call : plan.calls) {
    CHECK(call.first == first && call.count > 0);
    size_t bytes = 0;
    for (size_t i = 0; i < call.count; ++i) bytes += plan.runs.bytes[first + i];
    CHECK(bytes == call.bytes);
    first += call.count;
    total += bytes;
  }
  CHECK(first == plan.runs.size());
  CHECK(total == plan.total_bytes);
}

void test_random_plans(uint32_t seed) {
  std::printf("seed %u\n", seed);
  std::mt19937 random(seed);
  CopyPlan plan;
  const CopyLimits::PinnedSpan span{.base = kHost + 4096, .bytes = 1 << 30, .piece_bytes = 1 << 20};
  for (int i = 0; i < 300; ++i) {
    const CopyRuns runs = random_runs(&random);
    CopyLimits limits;
    limits.has_batch = random() % 2 != 0;
    limits.has_kernels = random() % 2 != 0;
    limits.staging_bytes = random() % 2 != 0 ? 1 << 18 : 64 << 20;
    if (random() % 2 != 0) limits.pinned = {&span, 1};
    plan_copies(CopyDirection::kHostToDevice, runs, {}, limits, &plan);
    check_plan(runs, plan);
    // Its two sets of vectors may change places, so both must have grown.
    plan_copies(CopyDirection::kHostToDevice, runs, {}, limits, &plan);
    const size_t before = allocations;
    plan_copies(CopyDirection::kHostToDevice, runs, {}, limits, &plan);
    CHECK(allocations == before);
    check_plan(runs, plan);
  }
}

}  // namespace

int main() {
  test_random_plans(std::random_device{}());
  return 0;
}
