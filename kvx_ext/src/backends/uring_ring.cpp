#include "backends/uring_ring.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

namespace kvx {

namespace {

// Values of the kernel's ABI under names of our own: the header of the build machine may be older
// than the kernel that runs us.
constexpr uint32_t kSetupDisabled = 1U << 6;       // 5.10
constexpr uint32_t kSetupSubmitAll = 1U << 7;      // 5.18
constexpr uint32_t kSetupSingleIssuer = 1U << 12;  // 6.0
constexpr uint32_t kSetupDeferTaskrun = 1U << 13;  // 6.1
constexpr unsigned kRegisterProbe = 8;
constexpr unsigned kRegisterEnableRings = 12;
constexpr unsigned kRegisterBuffers2 = 15;
constexpr unsigned kRegisterBuffersUpdate = 16;
constexpr uint32_t kRegisterSparse = 1U << 0;  // 5.19

struct BufferTable {  // io_uring_rsrc_register
  uint32_t slots;
  uint32_t flags;
  uint64_t reserved;
  uint64_t data;
  uint64_t tags;
};

struct BufferUpdate {  // io_uring_rsrc_update2
  uint32_t slot;
  uint32_t reserved;
  uint64_t data;
  uint64_t tags;
  uint32_t count;
  uint32_t reserved2;
};

int system_setup(uint32_t entries, io_uring_params* params) {
  const long result = syscall(__NR_io_uring_setup, entries, params);
  return result < 0 ? -errno : static_cast<int>(result);
}

int system_enter(int fd, uint32_t submit, uint32_t wait, uint32_t flags) {
  const long result = syscall(__NR_io_uring_enter, fd, submit, wait, flags, nullptr, 0);
  return result < 0 ? -errno : static_cast<int>(result);
}

int system_register(int fd, unsigned operation, const void* argument, uint32_t count) {
  const long result = syscall(__NR_io_uring_register, fd, operation, argument, count);
  return result < 0 ? -errno : static_cast<int>(result);
}

uint32_t load(const uint32_t* shared) {
  return std::atomic_ref<uint32_t>(*const_cast<uint32_t*>(shared)).load(std::memory_order_acquire);
}

void store(uint32_t* shared, uint32_t value) {
  std::atomic_ref<uint32_t>(*shared).store(value, std::memory_order_release);
}

}  // namespace

Status UringRing::create(uint32_t entries, std::unique_ptr<UringRing>* ring) {
  // The disabled start lets another thread than this one become the single issuer.
  constexpr std::array<uint32_t, 3> kSetups = {
      kSetupDisabled | kSetupSubmitAll | kSetupSingleIssuer | kSetupDeferTaskrun, kSetupDisabled,
      0};
  std::unique_ptr<UringRing> made(new UringRing);
  io_uring_params params;
  int fd = -EINVAL;
  for (const uint32_t setup : kSetups) {
    params = {};
    params.flags = setup;
    fd = system_setup(entries, &params);
    made->is_disabled_ = (setup & kSetupDisabled) != 0;
    if (fd != -EINVAL) break;  // EINVAL: a flag this kernel does not know
  }
  if (fd < 0) {
    return {Code::kUnavailable, std::string("io_uring_setup: ") + std::strerror(-fd), -fd};
  }
  made->fd_ = fd;
  if (Status status = made->map(params); !status.ok()) return status;
  *ring = std::move(made);
  return Status::Ok();
}

Status UringRing::map(const io_uring_params& params) {
  constexpr uint32_t kNeeded = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP;  // 5.5
  if ((params.features & kNeeded) != kNeeded) {
    return {Code::kUnavailable, "io_uring of this kernel is older than 5.5"};
  }
  rings_bytes_ = std::max(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                          params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
  entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
  const auto map_at = [&](size_t bytes, uint64_t offset) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_,
                static_cast<off_t>(offset));
  };
  void* rings = map_at(rings_bytes_, IORING_OFF_SQ_RING);
  if (rings == MAP_FAILED) return {Code::kUnavailable, "mmap of the rings failed", errno};
  rings_ = static_cast<uint8_t*>(rings);
  void* entries = map_at(entries_bytes_, IORING_OFF_SQES);
  if (entries == MAP_FAILED) return {Code::kUnavailable, "mmap of the entries failed", errno};
  entries_ = static_cast<io_uring_sqe*>(entries);

  const auto word = [&](uint32_t offset) { return reinterpret_cast<uint32_t*>(rings_ + offset); };
  submission_head_ = word(params.sq_off.head);
  submission_tail_ = word(params.sq_off.tail);
  submission_mask_ = *word(params.sq_off.ring_mask);
  completion_head_ = word(params.cq_off.head);
  completion_tail_ = word(params.cq_off.tail);
  completion_mask_ = *word(params.cq_off.ring_mask);
  completions_ = reinterpret_cast<io_uring_cqe*>(rings_ + params.cq_off.cqes);
  for (uint32_t i = 0; i < params.sq_entries; ++i) word(params.sq_off.array)[i] = i;
  return Status::Ok();
}

UringRing::~UringRing() {
  if (entries_ != nullptr) munmap(entries_, entries_bytes_);
  if (rings_ != nullptr) munmap(rings_, rings_bytes_);
  if (fd_ >= 0) ::close(fd_);
}

Status UringRing::enable() {
  if (!is_disabled_) return Status::Ok();
  const int result = system_register(fd_, kRegisterEnableRings, nullptr, 0);
  if (result < 0) return {Code::kUnavailable, "io_uring cannot be enabled", -result};
  return Status::Ok();
}

io_uring_sqe* UringRing::prepare() {
  if (prepared_ - load(submission_head_) > submission_mask_) return nullptr;
  io_uring_sqe* entry = &entries_[prepared_ & submission_mask_];
  ++prepared_;
  std::memset(entry, 0, sizeof *entry);
  return entry;
}

int UringRing::enter(bool wait) {
  if (published_ != prepared_) {
    published_ = prepared_;
    store(submission_tail_, published_);
  }
  const uint32_t submit = published_ - load(submission_head_);
  // GETEVENTS also without waiting: with DEFER_TASKRUN it is what runs the finished work.
  return system_enter(fd_, submit, wait ? 1 : 0, IORING_ENTER_GETEVENTS);
}

size_t UringRing::reap(std::span<io_uring_cqe> completions) {
  const uint32_t head = *completion_head_;  // only we write it
  const size_t ready = std::min<size_t>(load(completion_tail_) - head, completions.size());
  for (size_t i = 0; i < ready; ++i) {
    completions[i] = completions_[(head + i) & completion_mask_];
  }
  store(completion_head_, head + static_cast<uint32_t>(ready));
  return ready;
}

int UringRing::register_table(uint32_t slots) {
  const BufferTable table = {slots, kRegisterSparse, 0, 0, 0};
  return system_register(fd_, kRegisterBuffers2, &table, sizeof table);
}

int UringRing::set_buffer(uint32_t slot, uint8_t* base, int64_t bytes) {
  const iovec buffer = {bytes == 0 ? nullptr : base, static_cast<size_t>(bytes)};
  const uint64_t tag = 0;
  const BufferUpdate update = {
      slot, 0, reinterpret_cast<uint64_t>(&buffer), reinterpret_cast<uint64_t>(&tag), 1, 0};
  return system_register(fd_, kRegisterBuffersUpdate, &update, sizeof update);
}

int UringRing::has_operation(uint8_t operation) {
  constexpr uint32_t kOperations = 64;
  std::vector<uint8_t> memory(sizeof(io_uring_probe) + kOperations * sizeof(io_uring_probe_op));
  auto* probe = reinterpret_cast<io_uring_probe*>(memory.data());
  const int result = system_register(fd_, kRegisterProbe, probe, kOperations);
  if (result < 0) return result;
  if (operation >= probe->ops_len) return 0;
  return (probe->ops[operation].flags & IO_URING_OP_SUPPORTED) != 0 ? 1 : 0;
}

}  // namespace kvx
