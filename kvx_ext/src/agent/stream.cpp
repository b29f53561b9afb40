#include "agent/stream.h"

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cerrno>
#include <climits>
#include <cstring>

#include "agent/lent_pipe.h"

namespace kvx {

namespace {

// A frame brings one. The kernel hands out the descriptors of one sendmsg at a time, so what does
// not fit in here was never ours to begin with.
constexpr size_t kFdsAtOnce = 4;

size_t bounded(std::span<const iovec> parts) { return std::min<size_t>(parts.size(), IOV_MAX); }

// Takes ownership of every descriptor that the kernel installed, before anything can go wrong.
std::vector<UniqueFd> take_fds(msghdr* message) {
  std::vector<UniqueFd> taken;
  for (cmsghdr* part = CMSG_FIRSTHDR(message); part != nullptr; part = CMSG_NXTHDR(message, part)) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof(int));
      taken.emplace_back(fd);
    }
  }
  return taken;
}

class PlainStream final : public Stream {
 public:
  PlainStream(UniqueFd fd, bool is_unix) : fd_(std::move(fd)), is_unix_(is_unix) {}

  ssize_t receive(std::span<const iovec> target, std::vector<UniqueFd>* fds) override;
  ssize_t send(std::span<const iovec> source, int passed_fd) override;
  ssize_t lend(std::span<const iovec> source) override;
  void drop_lent() override { pipe_.drop(); }
  std::string failure() const override { return failure_; }
  int fd() const override { return fd_.get(); }

 private:
  ssize_t keep_fds(ssize_t received, msghdr* message, std::vector<UniqueFd>* fds);

  UniqueFd fd_;
  const bool is_unix_;
  std::string failure_;
  LentPipe pipe_;
  bool can_lend_ = true;
};

ssize_t PlainStream::lend(std::span<const iovec> source) {
  // Unix sockets copy what is spliced into them, a page at a time.
  if (is_unix_ || !can_lend_) return -ENOTSUP;
  const ssize_t sent = pipe_.send(fd_.get(), source);
  can_lend_ = sent != -ENOTSUP;
  return sent;
}

ssize_t PlainStream::receive(std::span<const iovec> target, std::vector<UniqueFd>* fds) {
  alignas(cmsghdr) std::array<uint8_t, CMSG_SPACE(kFdsAtOnce * sizeof(int))> control;
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(target.data());
  message.msg_iovlen = bounded(target);
  if (is_unix_) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
  }
  ssize_t received = 0;
  do {
    received = recvmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  } while (received < 0 && errno == EINTR);
  if (received < 0) return -errno;
  return is_unix_ ? keep_fds(received, &message, fds) : received;
}

ssize_t PlainStream::keep_fds(ssize_t received, msghdr* message, std::vector<UniqueFd>* fds) {
  std::vector<UniqueFd> taken = take_fds(message);
  if ((message->msg_flags & MSG_CTRUNC) != 0) {
    failure_ =
        "file descriptors were cut off: the peer passed too many at once, or this process may open "
        "no more (ulimit -n)";
    return -EPROTO;
  }
  if (fds == nullptr) return received;
  if (taken.size() > kPassedFdsMax - std::min(fds->size(), kPassedFdsMax)) {
    failure_ = "the peer passed more than " + std::to_string(kPassedFdsMax) +
               " file descriptors without frames to go with them";
    return -EPROTO;
  }
  std::move(taken.begin(), taken.end(), std::back_inserter(*fds));
  return received;
}

ssize_t PlainStream::send(std::span<const iovec> source, int passed_fd) {
  assert(passed_fd < 0 || is_unix_);
  alignas(cmsghdr) std::array<uint8_t, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(source.data());
  message.msg_iovlen = bounded(source);
  if (passed_fd >= 0) {
    message.msg_control = control.data();
    message.msg_controllen = control.size();
    cmsghdr* part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(part), &passed_fd, sizeof(int));
  }
  ssize_t sent = 0;
  do {
    sent = sendmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent < 0 ? -errno : sent;
}

}  // namespace

std::unique_ptr<Stream> make_plain_stream(UniqueFd fd, bool is_unix) {
  return std::make_unique<PlainStream>(std::move(fd), is_unix);
}

}  // namespace kvx
