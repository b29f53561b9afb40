// Two ends of a connection, and small things to do with them.
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "agent/stream.h"
#include "check.h"

namespace kvx {

inline constexpr int kPatienceMs = 10000;  // a test that waits longer has failed

// A directory of the test's own, removed at its end.
class TestDirectory {
 public:
  TestDirectory() { CHECK(mkdtemp(path_.data()) != nullptr); }
  ~TestDirectory() { std::filesystem::remove_all(path_); }
  TestDirectory(const TestDirectory&) = delete;
  TestDirectory& operator=(const TestDirectory&) = delete;
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_ = (std::filesystem::temp_directory_path() / "kvx-test-XXXXXX").string();
};

inline bool wait_for(int fd, short events) {
  pollfd one{.fd = fd, .events = events, .revents = 0};
  return poll(&one, 1, kPatienceMs) == 1;
}

inline iovec part_of(const void* bytes, size_t count) {
  return {.iov_base = const_cast<void*>(bytes), .iov_len = count};
}

inline ssize_t send_text(Stream& stream, const std::string& text, int passed_fd = -1) {
  const iovec part = part_of(text.data(), text.size());
  return stream.send({&part, 1}, passed_fd);
}

inline ssize_t receive_text(Stream& stream, std::string* text,
                            std::vector<UniqueFd>* fds = nullptr) {
  char buffer[256];
  const iovec part = part_of(buffer, sizeof(buffer));
  const ssize_t received = stream.receive({&part, 1}, fds);
  text->assign(buffer, static_cast<size_t>(std::max<ssize_t>(received, 0)));
  return received;
}

struct SocketPair {
  UniqueFd one;
  UniqueFd other;
};

inline SocketPair tcp_sockets() {
  UniqueFd listener;
  SocketPair pair;
  int port = 0;
  CHECK(listen_tcp_socket("127.0.0.1", 0, &listener, &port).ok() && port > 0);
  CHECK(dial_tcp_socket("127.0.0.1", port, &pair.one).ok());
  CHECK(wait_for(listener.get(), POLLIN));
  std::string address;
  pair.other = accept_socket(listener.get(), &address);
  CHECK(pair.other && address.starts_with("127.0.0.1:"));
  CHECK(wait_for(pair.one.get(), POLLOUT) && connect_error(pair.one.get()) == 0);
  tune_tcp(pair.one.get());
  tune_tcp(pair.other.get());
  return pair;
}

struct StreamPair {
  std::unique_ptr<Stream> one;
  std::unique_ptr<Stream> other;
};

inline StreamPair tcp_pair() {
  SocketPair pair = tcp_sockets();
  return {make_plain_stream(std::move(pair.one), false),
          make_plain_stream(std::move(pair.other), false)};
}

inline StreamPair unix_pair() {
  SocketPair pair;
  CHECK(pair_sockets(&pair.one, &pair.other).ok());
  return {make_plain_stream(std::move(pair.one), true),
          make_plain_stream(std::move(pair.other), true)};
}

}  // namespace kvx
