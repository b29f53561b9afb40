// Files as the backends want them: see backend_factory.h.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string>

#include "kvx/backend_factory.h"

namespace kvx {

namespace {

Status storage_error(const std::string& what, int error) {
  return {Code::kStorage, what + ": " + std::strerror(error), error};
}

int open_retrying(const char* path, int flags) {
  int fd = -1;
  do {
    fd = open(path, flags, 0600);
  } while (fd < 0 && errno == EINTR);
  return fd;
}

}  // namespace

Status open_file(const std::string& path, const OpenFlags& flags, int* fd, bool* is_direct) {
  int mode = O_RDWR | O_CLOEXEC;
  if (flags.create) mode |= O_CREAT;
  if (flags.create && flags.exclusive) mode |= O_EXCL;
  if (flags.direct) {
    *fd = open_retrying(path.c_str(), mode | O_DIRECT);
    *is_direct = *fd >= 0;
    if (*fd >= 0) return Status::Ok();
    if (errno != EINVAL) return storage_error("cannot open " + path, errno);
    // Refused only after the file was created: it is ours, and must not be in our own way now.
    mode &= ~O_EXCL;
  }
  *is_direct = false;
  *fd = open_retrying(path.c_str(), mode);
  if (*fd < 0) return storage_error("cannot open " + path, errno);
  return Status::Ok();
}

Status preallocate(int fd, int64_t offset, int64_t bytes) {
  if (offset < 0 || bytes <= 0) return {Code::kUsage, "preallocate needs offset >= 0, bytes > 0"};
  struct stat before = {};
  if (fstat(fd, &before) != 0) return storage_error("fstat", errno);
  int result = 0;
  do {
    result = fallocate(fd, 0, offset, bytes);
  } while (result != 0 && errno == EINTR);
  if (result == 0) return Status::Ok();
  const int error = errno;
  const int64_t end = offset + bytes;
  if (error == EOPNOTSUPP) {
    if (end > before.st_size && ftruncate(fd, end) != 0) return storage_error("ftruncate", errno);
    return {Code::kUnavailable, "the file system cannot reserve space; writes may meet ENOSPC",
            error};
  }
  // A file system may have grown the file before it ran out; give back what it took.
  struct stat after = {};
  if (fstat(fd, &after) == 0 && after.st_size > before.st_size) {
    if (ftruncate(fd, before.st_size) != 0) return storage_error("ftruncate", errno);
  }
  return storage_error("cannot reserve " + std::to_string(bytes) + " bytes", error);
}

}  // namespace kvx
