// Unix sockets by path or abstract name, and what to do about files that dead listeners left.
#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <thread>

#include "agent/stream.h"

namespace kvx {

namespace {

constexpr int kBacklog = 256;
constexpr int kTypes = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
constexpr mode_t kFileMode = 0600;
// Whoever else looks after sockets in the same directory holds its lock for some system calls.
constexpr int kLockTries = 100;
constexpr auto kLockPause = std::chrono::milliseconds(10);

struct UnixAddress {
  sockaddr_un name{};
  socklen_t bytes = 0;
  bool is_abstract() const { return name.sun_path[0] == '\0'; }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&name); }
};

Status failed(const std::string& what, const std::string& path, int error) {
  const char* remedy = "";
  if (error == ENOENT) remedy = "; its directory does not exist, or the peer is not running";
  if (error == EACCES) remedy = "; the file belongs to another user, or its directory does";
  if (error == ECONNREFUSED) remedy = "; nobody listens there any more: is the peer running?";
  if (error == EAGAIN) remedy = "; too many wait to be accepted there: try again";
  if (error == EMFILE || error == ENFILE) remedy = "; too many open files: raise `ulimit -n`";
  if (error == EROFS) remedy = "; the file system is read-only: choose another directory";
  return {Code::kUnavailable, what + " " + path + ": " + std::strerror(error) + remedy, error};
}

Status parse(const std::string& path, UnixAddress* address) {
  const size_t bytes_max = sizeof(address->name.sun_path) - 1;
  if (path.empty() || path == "@" || path.find('\0') != std::string::npos) {
    return {Code::kUsage, "a unix socket needs a path, or \"@\" and a name"};
  }
  if (path.size() > bytes_max) {
    return {Code::kUsage, "the path of a unix socket has at most " + std::to_string(bytes_max) +
                              " bytes, not " + std::to_string(path.size()) +
                              ": choose a shorter directory than in " + path};
  }
  address->name.sun_family = AF_UNIX;
  std::memcpy(address->name.sun_path, path.data(), path.size());
  if (path[0] == '@') address->name.sun_path[0] = '\0';
  // An abstract name is as long as it says; a path ends in a zero.
  address->bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() +
                                          (address->is_abstract() ? 0 : 1));
  return Status::Ok();
}

// Between looking whether a socket file is dead and replacing it, nobody else may do the same: two
// that start at once would each remove the other's.
Status lock_directory(const std::string& path, UniqueFd* lock) {
  std::filesystem::path directory = std::filesystem::path(path).parent_path();
  if (directory.empty()) directory = ".";
  *lock = UniqueFd(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!*lock) return failed("cannot open the directory of", path, errno);
  for (int i = 0; i < kLockTries; ++i) {
    if (flock(lock->get(), LOCK_EX | LOCK_NB) == 0) return Status::Ok();
    if (errno != EWOULDBLOCK && errno != EINTR)
      return failed("cannot lock the directory of", path, errno);
    std::this_thread::sleep_for(kLockPause);
  }
  return {Code::kUnavailable, "another process holds the lock of the directory of " + path +
                                  ": use a directory that is kvx's own"};
}

// Removes the file of a listener that is gone. kUsage: it is there, or it is no socket.
Status remove_stale(const std::string& path, const UnixAddress& address) {
  struct stat found{};
  if (lstat(path.c_str(), &found) != 0) {
    return errno == ENOENT ? Status::Ok() : failed("cannot look at", path, errno);
  }
  if (!S_ISSOCK(found.st_mode)) {
    return {Code::kUsage, path + " is there and is not a socket: choose another path"};
  }
  UniqueFd probe(socket(AF_UNIX, kTypes, 0));
  if (!probe) return failed("socket for", path, errno);
  if (connect(probe.get(), address.get(), address.bytes) == 0 || errno != ECONNREFUSED) {
    return {Code::kUsage,
            "another process listens on " + path + ": stop it, or choose another path", EADDRINUSE};
  }
  if (unlink(path.c_str()) != 0) return failed("cannot remove the stale socket", path, errno);
  return Status::Ok();
}

Status bind_and_listen(const std::string& path, const UnixAddress& address, UniqueFd* fd) {
  UniqueFd made(socket(AF_UNIX, kTypes, 0));
  if (!made) return failed("socket for", path, errno);
  // The file gets the mode of the socket (less the umask, which belongs to the whole process and so
  // is left alone): it is never open to others, not even for a moment.
  if (fchmod(made.get(), kFileMode) != 0) return failed("fchmod of the socket for", path, errno);
  if (bind(made.get(), address.get(), address.bytes) != 0) {
    if (errno == EADDRINUSE) {
      return {Code::kUsage,
              "another process listens on " + path + ": stop it, or choose another name",
              EADDRINUSE};
    }
    return failed("cannot listen on", path, errno);
  }
  // A umask that takes from the owner, or a file system with its own ideas.
  if (!address.is_abstract() && chmod(path.c_str(), kFileMode) != 0) {
    return failed("cannot make 0600:", path, errno);
  }
  if (listen(made.get(), kBacklog) != 0) return failed("cannot listen on", path, errno);
  *fd = std::move(made);
  return Status::Ok();
}

}  // namespace

Status listen_unix_socket(const std::string& path, UniqueFd* fd) {
  UnixAddress address;
  if (Status status = parse(path, &address); !status.ok()) return status;
  UniqueFd lock;  // until it listens: a socket that is bound only looks dead
  if (!address.is_abstract()) {
    if (Status status = lock_directory(path, &lock); !status.ok()) return status;
    if (Status status = remove_stale(path, address); !status.ok()) return status;
  }
  return bind_and_listen(path, address, fd);
}

Status dial_unix_socket(const std::string& path, UniqueFd* fd) {
  UnixAddress address;
  if (Status status = parse(path, &address); !status.ok()) return status;
  UniqueFd made(socket(AF_UNIX, kTypes, 0));
  if (!made) return failed("socket for", path, errno);
  if (connect(made.get(), address.get(), address.bytes) != 0) {
    return failed("cannot connect to", path, errno);
  }
  *fd = std::move(made);
  return Status::Ok();
}

}  // namespace kvx
