#include "agent/lent_pipe.h"

#include <fcntl.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>

namespace kvx {

namespace {

// What an unprivileged process may have; a piece fits.
constexpr int kPipeBytes = 1 << 20;
constexpr size_t kRowsAtOnce = 512;

// The part of `source` behind its first `skipped` bytes.
size_t behind(std::span<const iovec> source, size_t skipped, std::span<iovec> target) {
  size_t count = 0;
  for (const iovec& row : source) {
    if (count == target.size()) break;
    if (skipped >= row.iov_len) {
      skipped -= row.iov_len;
      continue;
    }
    target[count++] = {static_cast<uint8_t*>(row.iov_base) + skipped, row.iov_len - skipped};
    skipped = 0;
  }
  return count;
}

// splice() knows no MSG_NOSIGNAL: without this a peer that has left would end every process that
// does not ignore SIGPIPE.
class SigpipeGuard {
 public:
  SigpipeGuard() {
    sigemptyset(&only_);
    sigaddset(&only_, SIGPIPE);
    sigset_t pending;
    was_pending_ = sigpending(&pending) == 0 && sigismember(&pending, SIGPIPE) == 1;
    (void)pthread_sigmask(SIG_BLOCK, &only_, &former_);
  }
  ~SigpipeGuard() { (void)pthread_sigmask(SIG_SETMASK, &former_, nullptr); }
  SigpipeGuard(const SigpipeGuard&) = delete;
  SigpipeGuard& operator=(const SigpipeGuard&) = delete;

  // Takes back the signal of a call that failed with EPIPE, unless it is somebody else's.
  void take_back() const {
    const timespec none{};
    while (!was_pending_ && sigtimedwait(&only_, nullptr, &none) < 0 && errno == EINTR) {
    }
  }

 private:
  sigset_t only_;
  sigset_t former_;
  bool was_pending_ = false;
};

}  // namespace

bool LentPipe::open() {
  std::array<int, 2> ends;
  if (pipe2(ends.data(), O_CLOEXEC | O_NONBLOCK) != 0) return false;
  out_ = UniqueFd(ends[0]);
  in_ = UniqueFd(ends[1]);
  // Smaller works too, in more calls.
  (void)fcntl(in_.get(), F_SETPIPE_SZ, kPipeBytes);
  return true;
}

void LentPipe::drop() {
  if (held_ == 0) return;
  in_.reset();
  out_.reset();
  held_ = 0;
}

ssize_t LentPipe::send(int socket, std::span<const iovec> source) {
  if (!in_ && !open()) return -ENOTSUP;
  const SigpipeGuard guard;
  ssize_t total = 0;
  for (;;) {
    if (held_ == 0) {
      std::array<iovec, kRowsAtOnce> rows;
      const size_t count = behind(source, static_cast<size_t>(total), rows);
      if (count == 0) return total;
      const ssize_t lent = vmsplice(in_.get(), rows.data(), count, SPLICE_F_NONBLOCK);
      if (lent <= 0) return total > 0 ? total : -ENOTSUP;
      held_ = static_cast<size_t>(lent);
    }
    const ssize_t moved =
        splice(out_.get(), nullptr, socket, nullptr, held_, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) {
      const int error = moved == 0 ? EPIPE : errno;
      if (error == EPIPE) guard.take_back();
      if (total > 0) return total;
      if (error != EINVAL && error != ENOSYS && error != EPERM) return -error;
      drop();
      return -ENOTSUP;
    }
    held_ -= static_cast<size_t>(moved);
    total += moved;
  }
}

}  // namespace kvx
