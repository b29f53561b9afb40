// A connected socket that never blocks: plain or TLS, tcp or unix; and how such sockets are made.
#pragma once

#include <sys/uio.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kvx/status.h"

namespace kvx {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~UniqueFd() { reset(); }

  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }
  void reset() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// Descriptors in a `fds` that were received and not taken out yet.
inline constexpr size_t kPassedFdsMax = 64;

// One thread receives and sends at a time.
class Stream {
 public:
  virtual ~Stream() = default;

  // Bytes received (0: the other side has closed), or a negative errno; -EAGAIN: wait until
  // readable. Descriptors that came along are appended to `fds`, at most kPassedFdsMax of them:
  // more than that, or some that were cut off, end the stream (-EPROTO) and are closed. `fds` may
  // be null where none are wanted; they are closed. REQUIRES: room for a byte.
  virtual ssize_t receive(std::span<const iovec> target, std::vector<UniqueFd>* fds) = 0;
  // Bytes sent, or a negative errno; -EAGAIN: wait until writable. `passed_fd` (-1: none) goes with
  // the first byte, once one is accepted; it stays the caller's. REQUIRES: a byte to send.
  virtual ssize_t send(std::span<const iovec> source, int passed_fd) = 0;
  // Why receive() or send() failed, where there is more to say than the errno.
  virtual std::string failure() const { return {}; }
  // As send(), but the memory is not copied: it must stay as it is until the other side has taken
  // it. -ENOTSUP: use send(). Until what was begun here is sent, send() is not called in between.
  virtual ssize_t lend(std::span<const iovec>) { return -ENOTSUP; }
  // Gives up what was begun with lend(), and not sent yet.
  virtual void drop_lent() {}
  // TLS may hold bytes that poll does not know of: call receive() again before waiting.
  virtual bool has_buffered() const { return false; }
  // TLS may need the other direction first: while the first holds, wait until readable and call
  // send(); while the second holds, wait until writable too and call receive(). Asked after every
  // call, for any call may change them.
  virtual bool wants_read_to_send() const { return false; }
  virtual bool wants_write_to_receive() const { return false; }
  virtual bool is_encrypted() const { return false; }

  virtual int fd() const = 0;
};

std::unique_ptr<Stream> make_plain_stream(UniqueFd fd, bool is_unix);

// Sockets are non-blocking and close-on-exec. `host` may be a name or an address of either family.
// kUsage: the caller's address is wrong, or somebody listens there; kUnavailable: this machine or
// the network does not have it; both say what to do.
Status listen_tcp_socket(const std::string& host, int port, UniqueFd* fd, int* bound_port);
// A path, made 0600; a socket file that nobody listens on any more is replaced. Or "@name": the
// abstract namespace, which has no permissions and goes away with the listener.
Status listen_unix_socket(const std::string& path, UniqueFd* fd);
// Begins to connect: writable once it is decided, connect_error() tells how. A name may take a
// while to resolve; of several addresses each but the last has a quarter of a second to refuse.
Status dial_tcp_socket(const std::string& host, int port, UniqueFd* fd);
Status dial_unix_socket(const std::string& path, UniqueFd* fd);
Status pair_sockets(UniqueFd* one, UniqueFd* other);
// Empty with errno set when there is none to accept.
UniqueFd accept_socket(int listener, std::string* address);
// 0, or the errno with which connecting failed.
int connect_error(int fd);
// No delay, no lingering, keep-alive, and buffers that the kernel sizes itself.
void tune_tcp(int fd);
// Once connected: what suits the way to the other end.
void tune_connected_tcp(int fd);

struct PeerProcess {
  int32_t pid = 0;
  uint32_t uid = 0;
};
// Who is at the other end of a unix socket.
Status peer_process(int fd, PeerProcess* process);

struct TcpHealth {
  int64_t unacknowledged = 0;  // segments
  int64_t retransmits = 0;     // of the oldest of them
};
// Zeros for other sockets.
TcpHealth tcp_health(int fd);

}  // namespace kvx
