// How sockets are made: whose file is whose, what every error says, who is at the other end.
#include <sched.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <latch>
#include <thread>

#include "stream_pairs.h"

namespace {

using namespace kvx;

bool says(const Status& status, Code code, const std::string& text) {
  const bool is_right = status.code() == code && status.message().find(text) != std::string::npos;
  if (!is_right)
    std::fprintf(stderr, "code %d: %s\n", static_cast<int>(status.code()),
                 status.message().c_str());
  return is_right;
}

void test_unix_file_is_ours_alone() {
  const TestDirectory directory;
  const std::string path = directory / "socket";
  const mode_t usual = umask(0);
  UniqueFd listener;
  CHECK(listen_unix_socket(path, &listener).ok());
  CHECK(umask(usual) == 0);  // nobody else's files were affected meanwhile
  struct stat found{};
  CHECK(stat(path.c_str(), &found) == 0 && (found.st_mode & 07777) == 0600);
  UniqueFd dialled;
  CHECK(dial_unix_socket(path, &dialled).ok() && wait_for(dialled.get(), POLLOUT));
  CHECK(connect_error(dialled.get()) == 0);
  std::string address;
  const UniqueFd accepted = accept_socket(listener.get(), &address);
  CHECK(accepted && address == "unix");
  CHECK(!accept_socket(listener.get(), &address) && errno == EAGAIN);
}

void test_stale_and_live_files() {
  const TestDirectory directory;
  const std::string path = directory / "socket";
  UniqueFd listener;
  CHECK(listen_unix_socket(path, &listener).ok());
  UniqueFd second;
  CHECK(says(listen_unix_socket(path, &second), Code::kUsage, "another process listens"));
  UniqueFd dialled;
  CHECK(dial_unix_socket(path, &dialled).ok());  // and it was left in peace
  listener.reset();
  CHECK(says(dial_unix_socket(path, &dialled), Code::kUnavailable, "nobody listens"));
  CHECK(listen_unix_socket(path, &second).ok());
  CHECK(dial_unix_socket(path, &dialled).ok());

  const std::string file = directory / "file";
  std::ofstream(file) << "precious";
  CHECK(says(listen_unix_socket(file, &second), Code::kUsage, "is not a socket"));
  CHECK(std::filesystem::file_size(file) == 8);
  const std::string link = directory / "link";
  std::filesystem::create_symlink(path, link);
  CHECK(says(listen_unix_socket(link, &listener), Code::kUsage, "is not a socket"));
}

// Whoever wins, nobody takes the socket of somebody who listens already.
void test_one_of_two_gets_it() {
  const TestDirectory directory;
  const std::string path = directory / "socket";
  for (int round = 0; round < 200; ++round) {
    UniqueFd stale;
    CHECK(listen_unix_socket(path, &stale).ok());
    stale.reset();
    UniqueFd listeners[4];
    std::atomic<int> winners{0};
    std::latch start(4);
    std::vector<std::thread> threads;
    for (UniqueFd& listener : listeners) {
      threads.emplace_back([&] {
        start.arrive_and_wait();
        winners += listen_unix_socket(path, &listener).ok();
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(winners == 1);
    UniqueFd dialled;
    CHECK(dial_unix_socket(path, &dialled).ok());
  }
}

void test_abstract_names() {
  const std::string name = "@kvx-test-" + std::to_string(getpid());
  UniqueFd listener;
  UniqueFd second;
  CHECK(listen_unix_socket(name, &listener).ok());
  CHECK(says(listen_unix_socket(name, &second), Code::kUsage, "another process listens"));
  CHECK(dial_unix_socket(name, &second).ok());
  CHECK(says(dial_unix_socket(name + "x", &second), Code::kUnavailable, "nobody listens"));
}

void test_wrong_paths() {
  const TestDirectory directory;
  UniqueFd fd;
  CHECK(says(listen_unix_socket("", &fd), Code::kUsage, "needs a path"));
  CHECK(says(dial_unix_socket("@", &fd), Code::kUsage, "needs a path"));
  CHECK(says(listen_unix_socket(directory / std::string(108, 'x'), &fd), Code::kUsage,
             "at most 107"));
  CHECK(says(listen_unix_socket(directory / "none/socket", &fd), Code::kUnavailable,
             "does not exist"));
  CHECK(says(dial_unix_socket(directory / "none", &fd), Code::kUnavailable, "not running"));
}

void test_full_backlog() {
  const TestDirectory directory;
  UniqueFd listener;
  CHECK(listen_unix_socket(directory / "socket", &listener).ok());
  std::vector<UniqueFd> waiting(1000);
  Status status;
  for (UniqueFd& fd : waiting) {
    status = dial_unix_socket(directory / "socket", &fd);
    if (!status.ok()) break;
  }
  CHECK(says(status, Code::kUnavailable, "try again") && status.error_number() == EAGAIN);
  UniqueFd second;
  CHECK(says(listen_unix_socket(directory / "socket", &second), Code::kUsage, "listens"));
}

void test_wrong_tcp_addresses() {
  UniqueFd listener;
  UniqueFd fd;
  int port = 0;
  CHECK(listen_tcp_socket("127.0.0.1", 0, &listener, &port).ok());
  int other_port = 0;
  const Status in_use = listen_tcp_socket("127.0.0.1", port, &fd, &other_port);
  CHECK(says(in_use, Code::kUsage, "port 0 for a free one") && in_use.error_number() == EADDRINUSE);
  CHECK(says(listen_tcp_socket("192.0.2.1", 0, &fd, &other_port), Code::kUsage, "no interface"));
  CHECK(says(listen_tcp_socket("", 65536, &fd, &other_port), Code::kUsage, "port 65536"));
  CHECK(says(dial_tcp_socket("127.0.0.1", 0, &fd), Code::kUsage, "port 0"));
  CHECK(says(dial_tcp_socket("", 1, &fd), Code::kUsage, "no host name"));
  CHECK(says(dial_tcp_socket("not a name", 1, &fd), Code::kUnavailable, "does not resolve"));
}

// A refusal is seen by whoever waits for the socket to become writable.
void test_refused() {
  UniqueFd listener;
  UniqueFd fd;
  int port = 0;
  CHECK(listen_tcp_socket("127.0.0.1", 0, &listener, &port).ok());
  listener.reset();
  const Status status = dial_tcp_socket("127.0.0.1", port, &fd);
  CHECK(status.ok() && wait_for(fd.get(), POLLOUT) && connect_error(fd.get()) == ECONNREFUSED);
}

// In a child that sees another /etc/hosts; false where it may not.
bool rename_hosts(const std::string& hosts) {
  return unshare(CLONE_NEWNS) == 0 &&
         mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
         mount(hosts.c_str(), "/etc/hosts", nullptr, MS_BIND, nullptr) == 0;
}

// A name may be ::1 first, where nobody listens.
void test_name_with_two_addresses() {
  const TestDirectory directory;
  std::ofstream(directory / "hosts") << "::1 kvx-two\n127.0.0.1 kvx-two\n";
  UniqueFd listener;
  int port = 0;
  CHECK(listen_tcp_socket("127.0.0.1", 0, &listener, &port).ok());
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    if (!rename_hosts(directory / "hosts")) _exit(2);
    UniqueFd fd;
    const bool is_there = dial_tcp_socket("kvx-two", port, &fd).ok() &&
                          wait_for(fd.get(), POLLOUT) && send(fd.get(), "x", 1, 0) == 1;
    _exit(is_there ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) != 1);
  if (WEXITSTATUS(status) == 2)
    std::puts("skipped: a name with two addresses, needs CAP_SYS_ADMIN");
}

void test_peer_process() {
  const TestDirectory directory;
  UniqueFd listener;
  CHECK(listen_unix_socket(directory / "socket", &listener).ok());
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    UniqueFd dialled;
    const bool is_there = dial_unix_socket(directory / "socket", &dialled).ok();
    _exit(is_there && wait_for(dialled.get(), POLLIN) ? 0 : 1);
  }
  CHECK(wait_for(listener.get(), POLLIN));
  std::string address;
  UniqueFd accepted = accept_socket(listener.get(), &address);
  PeerProcess process;
  CHECK(peer_process(accepted.get(), &process).ok());
  CHECK(process.pid == child && process.uid == getuid());
  accepted.reset();
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  CHECK(says(peer_process(tcp_sockets().one.get(), &process), Code::kUsage, "only a unix socket"));
}

}  // namespace

int main() {
  test_unix_file_is_ours_alone();
  test_stale_and_live_files();
  test_one_of_two_gets_it();
  test_abstract_names();
  test_wrong_paths();
  test_full_backlog();
  test_wrong_tcp_addresses();
  test_refused();
  test_name_with_two_addresses();
  test_peer_process();
  std::puts("sockets: ok");
  return 0;
}
