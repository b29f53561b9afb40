// The io_uring backend: a UringLoop, its thread, and what can be said when there is none.
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>
#include <system_error>
#include <thread>

#include "backends/backends.h"
#include "backends/uring_loop.h"
#include "kvx/backend_factory.h"

namespace kvx {

namespace {

class UringBackend final : public IoBackend {
 public:
  explicit UringBackend(std::shared_ptr<UringLoop> loop) : loop_(std::move(loop)) {}
  ~UringBackend() override { (void)close(0.0); }

  void start() {
    thread_ = std::thread([loop = loop_] { loop->run(); });
  }

  std::string_view name() const override { return "io_uring"; }

  Status register_buffer(uint8_t* base, int64_t bytes) override {
    if (bytes <= 0) return {Code::kUsage, "an empty buffer cannot be registered"};
    return loop_->change_buffer(base, bytes).get();
  }
  void unregister_buffer(uint8_t* base) override { (void)loop_->change_buffer(base, 0); }

  void submit(std::span<const IoRequest> requests) override { loop_->submit(requests); }
  void cancel(uint64_t token) override { loop_->cancel(token); }

  int64_t close(double timeout_s) override {
    if (!thread_.joinable()) return 0;
    if (loop_->close(deadline_after(timeout_s))) {
      thread_.join();
    } else {
      thread_.detach();
    }
    return loop_->abandon();
  }

 private:
  const std::shared_ptr<UringLoop> loop_;
  std::thread thread_;
};

// Why the kernel said no, in words that lead to the remedy.
std::string explain(const Status& status) {
  if (status.error_number() == ENOSYS) return "this kernel (or sandbox) has no io_uring";
  if (status.error_number() != EPERM) return status.message();
  int disabled = 0;
  std::ifstream("/proc/sys/kernel/io_uring_disabled") >> disabled;
  if (disabled == 2) return "io_uring is switched off (sysctl kernel.io_uring_disabled=2)";
  if (disabled == 1) {
    return "io_uring is kept to a group (sysctl kernel.io_uring_disabled=1, io_uring_group)";
  }
  return "io_uring is forbidden here (EPERM, most likely a container's seccomp profile)";
}

}  // namespace

Status probe_io_uring() {
  std::unique_ptr<UringRing> ring;
  if (Status status = UringRing::create(4, &ring); !status.ok()) {
    return {Code::kUnavailable, explain(status), status.error_number()};
  }
  if (Status status = ring->enable(); !status.ok()) {
    return {Code::kUnavailable, explain(status), status.error_number()};
  }
  constexpr std::array<uint8_t, 7> kOperations = {
      IORING_OP_READ,  IORING_OP_WRITE,    IORING_OP_READ_FIXED,  IORING_OP_WRITE_FIXED,
      IORING_OP_FSYNC, IORING_OP_POLL_ADD, IORING_OP_ASYNC_CANCEL};
  for (const uint8_t operation : kOperations) {
    if (ring->has_operation(operation) <= 0) {
      return {Code::kUnavailable,
              "io_uring of this kernel lacks operation " + std::to_string(operation)};
    }
  }
  return Status::Ok();
}

Status make_uring(int queue_depth, IoSink sink, std::unique_ptr<IoBackend>* backend) {
  if (queue_depth < 1 || queue_depth > 4096) {
    return {Code::kUsage, "queue_depth must be in 1..4096"};
  }
  if (Status status = probe_io_uring(); !status.ok()) return status;
  std::unique_ptr<UringRing> ring;
  // One entry per flight, one for its cancel, one for the wake-up.
  const auto entries = static_cast<uint32_t>(2 * queue_depth + 1);
  if (Status status = UringRing::create(entries, &ring); !status.ok()) {
    return {Code::kUnavailable, explain(status), status.error_number()};
  }
  const int wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd < 0) {
    return {Code::kUnavailable, std::string("eventfd: ") + std::strerror(errno), errno};
  }
  auto made = std::make_unique<UringBackend>(
      std::make_shared<UringLoop>(std::move(ring), wake_fd, queue_depth, std::move(sink)));
  try {
    made->start();
  } catch (const std::system_error& error) {
    return {Code::kUnavailable, std::string("cannot start the ring's thread: ") + error.what(),
            error.code().value()};
  }
  *backend = std::move(made);
  return Status::Ok();
}

}  // namespace kvx
