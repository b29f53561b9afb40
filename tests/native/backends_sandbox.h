// Processes that are allowed less than this one: no io_uring, or no pinned memory.
#pragma once

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <string>
#include <vector>

#include "check.h"
#include "kvx/backend_factory.h"

namespace sandbox {

// Makes io_uring_setup answer `error`, as a container's seccomp profile does.
inline void forbid_io_uring(int error) {
  const auto answer = static_cast<uint32_t>(SECCOMP_RET_ERRNO | (error & SECCOMP_RET_DATA));
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, answer),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {4, code};
  CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

inline void check_fallback(int error, const std::string& expected) {
  forbid_io_uring(error);
  CHECK(kvx::probe_io_uring().code() == kvx::Code::kUnavailable);
  const kvx::IoSink nothing = [](std::span<const kvx::IoCompletion>) {};
  std::unique_ptr<kvx::IoBackend> backend;
  std::string why;
  CHECK(kvx::make_backend(kvx::BackendKind::kUring, {}, nothing, &backend, &why).code() ==
        kvx::Code::kUnavailable);
  CHECK(kvx::make_backend(kvx::BackendKind::kAuto, {}, nothing, &backend, &why).ok());
  CHECK(backend->name() == "posix");
  CHECK(why.find(expected) != std::string::npos);
}

// Registration is refused with a reason, and the requests work all the same.
inline void check_memlock() {
  const rlimit little = {65536, 65536};
  CHECK(setrlimit(RLIMIT_MEMLOCK, &little) == 0);
  CHECK(setresuid(65534, 65534, 65534) == 0);  // gives up CAP_IPC_LOCK
  if (!kvx::probe_io_uring().ok()) return;
  std::mutex mutex;
  std::condition_variable news;
  kvx::Code code = kvx::Code::kTimeout;
  const kvx::IoSink sink = [&](std::span<const kvx::IoCompletion> done) {
    std::lock_guard lock(mutex);
    code = done[0].code;
    news.notify_all();
  };
  std::unique_ptr<kvx::IoBackend> backend;
  CHECK(kvx::make_backend(kvx::BackendKind::kUring, {}, sink, &backend, nullptr).ok());
  std::vector<uint8_t> buffer(8 << 20);
  const kvx::Status status = backend->register_buffer(buffer.data(), 8 << 20);
  CHECK(status.error_number() == ENOMEM);
  CHECK(status.message().find("ulimit -l") != std::string::npos);
  FILE* file = tmpfile();
  if (file == nullptr) return;  // nobody may not write there
  const kvx::IoRequest request = {kvx::IoKind::kWrite, fileno(file), buffer.data(), 8 << 20, 0, 1};
  backend->submit({&request, 1});
  std::unique_lock lock(mutex);
  news.wait(lock, [&] { return code != kvx::Code::kTimeout; });
  CHECK(code == kvx::Code::kOk);
  lock.unlock();
  CHECK(backend->close(10.0) == 0);
}

template <typename Body>
void in_child(Body body) {
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    body();
    _exit(0);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

inline void test_all() {
  in_child([] { check_fallback(EPERM, "seccomp"); });
  in_child([] { check_fallback(ENOSYS, "no io_uring"); });
  if (geteuid() == 0) in_child(check_memlock);
}

}  // namespace sandbox
