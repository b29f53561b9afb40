#include <sys/mman.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <thread>

#include "check.h"
#include "kvx/memory.h"

namespace {

using kvx::HostRegion;
using kvx::RegionKind;

void test_alignment_and_prefault() {
  for (int64_t bytes : {int64_t{1}, int64_t{4096}, int64_t{5000}, int64_t{3 << 20}}) {
    std::unique_ptr<HostRegion> region;
    CHECK(HostRegion::create(bytes, RegionKind::kAnonymous, -1, &region).ok());
    CHECK(region->bytes() % kvx::kAlignment == 0 && region->bytes() >= bytes);
    const auto address = reinterpret_cast<uintptr_t>(region->data());
    CHECK(address % (bytes >= (2 << 20) ? (2 << 20) : kvx::kAlignment) == 0);
    CHECK(region->prefault(2, nullptr).ok());
    CHECK(region->prefaulted_bytes() == region->bytes());
    std::memset(region->data(), 1, static_cast<size_t>(region->bytes()));
  }
}

void test_shared_region_is_shared() {
  std::unique_ptr<HostRegion> region;
  CHECK(HostRegion::create(8192, RegionKind::kMemfd, 0, &region).ok());
  void* other = mmap(nullptr, 8192, PROT_READ, MAP_SHARED, region->fd(), 0);
  CHECK(other != MAP_FAILED);
  region->data()[5000] = 42;
  CHECK(static_cast<uint8_t*>(other)[5000] == 42);
  munmap(other, 8192);
}

void test_bad_arguments() {
  std::unique_ptr<HostRegion> region;
  CHECK(HostRegion::create(0, RegionKind::kAnonymous, -1, &region).code() == kvx::Code::kUsage);
  CHECK(HostRegion::create(1, RegionKind::kAnonymous, 64, &region).code() == kvx::Code::kUsage);
  CHECK(region == nullptr);
}

void test_prefault_stops() {
  std::unique_ptr<HostRegion> region;
  CHECK(HostRegion::create(256 << 20, RegionKind::kAnonymous, -1, &region).ok());
  std::atomic<bool> stop{true};
  CHECK(region->prefault(2, &stop).code() == kvx::Code::kCancelled);
  CHECK(region->prefaulted_bytes() == 0);
}

}  // namespace

int main() {
  test_alignment_and_prefault();
  test_shared_region_is_shared();
  test_bad_arguments();
  test_prefault_stops();
  CHECK(kvx::numa_node_count() >= 1);
  std::puts("memory: ok");
  return 0;
}
