#include "kvx/memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

namespace kvx {

namespace {

constexpr int64_t kHugePageBytes = 2 << 20;
constexpr int64_t kPrefaultStepBytes = 32 << 20;
constexpr int kCollapse = 25;   // MADV_COLLAPSE of <linux/mman.h>, since 6.1
constexpr int kPreferNode = 1;  // MPOL_PREFERRED of <linux/mempolicy.h>

Status failed(const char* call, int64_t bytes) {
  const int error = errno;
  return {error == ENOMEM ? Code::kCapacity : Code::kUnavailable,
          std::string(call) + " of " + std::to_string(bytes) + " bytes: " + std::strerror(error),
          error};
}

// Advice only: a kernel that refuses gives slower memory, not wrong memory.
void advise(uint8_t* data, int64_t bytes, int numa_node) {
  if (bytes >= kHugePageBytes) madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  if (numa_node < 0) return;
  const uint64_t mask = uint64_t{1} << numa_node;
  syscall(SYS_mbind, data, static_cast<unsigned long>(bytes), kPreferNode, &mask, sizeof(mask) * 8,
          0U);
}

// Pages of a memfd are small wherever the machine keeps huge ones from shared memory, which is the
// default; joined afterwards they copy a quarter faster, here and where a peer maps them. Advice.
void collapse(uint8_t* data, int64_t bytes) {
  if (bytes >= kHugePageBytes) (void)madvise(data, static_cast<size_t>(bytes), kCollapse);
}

}  // namespace

Status HostRegion::create(int64_t bytes, RegionKind kind, int numa_node,
                          std::unique_ptr<HostRegion>* region) {
  if (bytes <= 0) return {Code::kUsage, "a region needs bytes > 0, not " + std::to_string(bytes)};
  if (numa_node >= 64) return {Code::kUsage, "numa_node must be below 64"};
  std::unique_ptr<HostRegion> made(new HostRegion());
  made->bytes_ = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  // Mapped one huge page larger so that the start can be moved to a huge-page boundary.
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (kind == RegionKind::kMemfd) {
    made->fd_ = memfd_create("kvx", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (made->fd_ < 0) return failed("memfd_create", made->bytes_);
    if (ftruncate(made->fd_, made->bytes_) != 0) return failed("ftruncate", made->bytes_);
    flags = MAP_SHARED | MAP_NORESERVE;
  }
  const int64_t slack = made->bytes_ >= kHugePageBytes ? kHugePageBytes : 0;
  void* reserved = mmap(nullptr, static_cast<size_t>(made->bytes_ + slack), PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return failed("mmap", made->bytes_);
  auto* start = static_cast<uint8_t*>(reserved);
  const int64_t lead =
      slack == 0 ? 0
                 : (kHugePageBytes -
                    static_cast<int64_t>(reinterpret_cast<uintptr_t>(start) % kHugePageBytes)) %
                       kHugePageBytes;
  if (lead > 0) munmap(start, static_cast<size_t>(lead));
  if (slack > lead) munmap(start + lead + made->bytes_, static_cast<size_t>(slack - lead));
  made->data_ = start + lead;
  void* mapped = mmap(made->data_, static_cast<size_t>(made->bytes_), PROT_READ | PROT_WRITE,
                      flags | MAP_FIXED, made->fd_, 0);
  if (mapped == MAP_FAILED) return failed("mmap", made->bytes_);
  advise(made->data_, made->bytes_, numa_node);
  *region = std::move(made);
  return Status::Ok();
}

HostRegion::~HostRegion() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
  if (fd_ >= 0) close(fd_);
}

Status HostRegion::prefault(int threads, const std::atomic<bool>* stop) {
  std::atomic<int64_t> cursor{0};
  std::atomic<int> error{0};
  prefaulted_.store(0, std::memory_order_relaxed);
  auto populate = [&] {
    for (;;) {
      if (error.load() != 0 || (stop != nullptr && stop->load())) return;
      const int64_t offset = cursor.fetch_add(kPrefaultStepBytes);
      if (offset >= bytes_) return;
      const int64_t piece = std::min(kPrefaultStepBytes, bytes_ - offset);
      int result;
      do {
        result = madvise(data_ + offset, static_cast<size_t>(piece), MADV_POPULATE_WRITE);
      } while (result != 0 && (errno == EINTR || errno == EAGAIN));
      if (result != 0 && errno == EINVAL) {  // kernels before 5.14: touch every page instead
        for (int64_t at = offset; at < offset + piece; at += kAlignment) {
          std::atomic_ref<uint8_t>(data_[at]).fetch_or(0, std::memory_order_relaxed);
        }
        result = 0;
      }
      if (result != 0) {
        error.store(errno);
        return;
      }
      if (fd_ >= 0) collapse(data_ + offset, piece);
      prefaulted_.fetch_add(piece, std::memory_order_relaxed);
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(populate);
  populate();
  for (std::thread& thread : pool) thread.join();
  if (error.load() != 0) {
    errno = error.load();
    return failed("MADV_POPULATE_WRITE", bytes_);
  }
  if (prefaulted_bytes() < bytes_) return {Code::kCancelled, "prefault stopped"};
  return Status::Ok();
}

int numa_node_count() {
  int nodes = 0;
  std::error_code error;
  const std::filesystem::path root = "/sys/devices/system/node";
  for (const auto& entry : std::filesystem::directory_iterator(root, error)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("node") && name.size() > 4 && name[4] >= '0' && name[4] <= '9') ++nodes;
  }
  return std::max(nodes, 1);
}

}  // namespace kvx
