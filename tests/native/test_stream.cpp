// Plain streams: what goes in comes out, descriptors go along and never leak, ends are ends.
#include <fcntl.h>
#include <linux/filter.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include <climits>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>

#include "agent/lent_pipe.h"
#include "stream_pairs.h"

namespace {

using namespace kvx;

using MakePair = StreamPair (*)();
constexpr MakePair kBoth[] = {tcp_pair, unix_pair};

size_t open_fds() {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    count += !entry.path().empty();
  }
  return count;
}

UniqueFd memfd(const std::string& text) {
  UniqueFd made(memfd_create("kvx-test", 0));
  CHECK(made && write(made.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()));
  return made;
}

void test_parts_come_in_order() {
  for (const MakePair make : kBoth) {
    const StreamPair pair = make();
    const iovec sent[] = {part_of("ab", 2), part_of("", 0), part_of("cdef", 4)};
    CHECK(pair.one->send(sent, -1) == 6);
    CHECK(wait_for(pair.other->fd(), POLLIN));
    char first[1];
    char second[9];
    const iovec target[] = {part_of(first, 1), part_of(second, 9)};
    CHECK(pair.other->receive(target, nullptr) == 6);
    CHECK(first[0] == 'a' && std::memcmp(second, "bcdef", 5) == 0);
    CHECK(pair.other->receive(target, nullptr) == -EAGAIN);
  }
}

void test_more_parts_than_the_kernel_takes() {
  const StreamPair pair = unix_pair();
  const std::vector<iovec> parts(IOV_MAX + 10, part_of("x", 1));
  CHECK(pair.one->send(parts, -1) == IOV_MAX);
  std::vector<char> bytes(parts.size());
  std::vector<iovec> target;
  for (char& byte : bytes) target.push_back(part_of(&byte, 1));
  CHECK(pair.other->receive(target, nullptr) == IOV_MAX);
}

// Everything arrives, in order, through buffers that fill up meanwhile.
void test_full_buffers(uint64_t seed) {
  for (const MakePair make : kBoth) {
    const StreamPair pair = make();
    std::mt19937_64 random(seed);
    std::vector<uint8_t> sent(8 << 20);
    for (uint8_t& byte : sent) byte = static_cast<uint8_t>(random());
    std::vector<uint8_t> received(sent.size());
    size_t out = 0;
    size_t in = 0;
    int full = 0;
    while (in < sent.size()) {
      while (out < sent.size()) {
        const iovec part = part_of(sent.data() + out, sent.size() - out);
        const ssize_t count = pair.one->send({&part, 1}, -1);
        if (count == -EAGAIN) ++full;
        if (count == -EAGAIN) break;
        CHECK(count > 0);
        out += static_cast<size_t>(count);
      }
      CHECK(wait_for(pair.other->fd(), POLLIN));
      const size_t wanted = std::min<size_t>(1 + random() % (1 << 20), received.size() - in);
      const iovec part = part_of(received.data() + in, wanted);
      const ssize_t count = pair.other->receive({&part, 1}, nullptr);
      CHECK(count > 0);
      in += static_cast<size_t>(count);
    }
    CHECK(full > 0 && received == sent);
  }
}

void test_descriptor_goes_along() {
  const StreamPair pair = unix_pair();
  const UniqueFd passed = memfd("inside");
  CHECK(send_text(*pair.one, "before") == 6);
  CHECK(send_text(*pair.one, "with", passed.get()) == 4);
  std::string all;
  std::string text;
  std::vector<UniqueFd> fds;
  while (all.size() < 10) {
    CHECK(receive_text(*pair.other, &text, &fds) > 0);
    // Not before the first byte that it was sent with.
    CHECK(fds.empty() || all.size() + text.size() > 6);
    all += text;
  }
  CHECK(all == "beforewith" && fds.size() == 1);
  CHECK((fcntl(fds[0].get(), F_GETFD) & FD_CLOEXEC) != 0);
  char inside[7] = {};
  CHECK(pread(fds[0].get(), inside, 6, 0) == 6 && std::string(inside) == "inside");
  CHECK(fcntl(passed.get(), F_GETFD) >= 0);  // still the sender's own
}

void fill(Stream& stream) {
  const std::vector<char> zeros(1 << 16);
  const iovec part = part_of(zeros.data(), zeros.size());
  while (stream.send({&part, 1}, -1) != -EAGAIN) {
  }
}

// A descriptor that was not taken with -EAGAIN goes along once, later.
void test_descriptor_waits_for_room() {
  const StreamPair pair = unix_pair();
  const UniqueFd passed = memfd("inside");
  fill(*pair.one);
  CHECK(send_text(*pair.one, "x", passed.get()) == -EAGAIN);
  std::vector<UniqueFd> fds;
  std::string text;
  while (receive_text(*pair.other, &text, &fds) > 0) {
  }
  CHECK(fds.empty() && send_text(*pair.one, "x", passed.get()) == 1);
  CHECK(receive_text(*pair.other, &text, &fds) == 1 && fds.size() == 1);
}

void send_many(int socket, int passed, size_t count) {
  std::vector<uint8_t> control(CMSG_SPACE(count * sizeof(int)));
  char byte = 'x';
  iovec part = part_of(&byte, 1);
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(count * sizeof(int));
  for (size_t i = 0; i < count; ++i) {
    std::memcpy(CMSG_DATA(header) + i * sizeof(int), &passed, sizeof(int));
  }
  CHECK(sendmsg(socket, &message, 0) == 1);
}

void test_unwanted_descriptors_are_closed() {
  const StreamPair pair = unix_pair();
  const UniqueFd passed = memfd("");
  const size_t before = open_fds();
  std::string text;
  send_many(pair.one->fd(), passed.get(), 2);
  CHECK(receive_text(*pair.other, &text, nullptr) == 1 && open_fds() == before);

  std::vector<UniqueFd> fds;
  send_many(pair.one->fd(), passed.get(), 100);
  CHECK(receive_text(*pair.other, &text, &fds) == -EPROTO && fds.empty());
  CHECK(open_fds() == before && pair.other->failure().find("cut off") != std::string::npos);
}

void test_descriptors_without_frames_are_bounded() {
  const StreamPair pair = unix_pair();
  const UniqueFd passed = memfd("");
  const size_t before = open_fds();
  std::vector<UniqueFd> fds;
  std::string text;
  for (size_t i = 0; i < kPassedFdsMax; ++i) {
    CHECK(send_text(*pair.one, "x", passed.get()) == 1);
    CHECK(receive_text(*pair.other, &text, &fds) == 1);
  }
  CHECK(fds.size() == kPassedFdsMax && open_fds() == before + kPassedFdsMax);
  CHECK(send_text(*pair.one, "x", passed.get()) == 1);
  CHECK(receive_text(*pair.other, &text, &fds) == -EPROTO && !pair.other->failure().empty());
  CHECK(open_fds() == before + kPassedFdsMax);
}

void test_no_descriptors_left() {
  const StreamPair pair = unix_pair();
  const UniqueFd passed = memfd("");
  CHECK(send_text(*pair.one, "x", passed.get()) == 1);
  rlimit usual{};
  CHECK(getrlimit(RLIMIT_NOFILE, &usual) == 0);
  rlimit none = usual;
  none.rlim_cur = 3;
  CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
  std::vector<UniqueFd> fds;
  std::string text;
  const ssize_t received = receive_text(*pair.other, &text, &fds);
  CHECK(setrlimit(RLIMIT_NOFILE, &usual) == 0);
  CHECK(received == -EPROTO && fds.empty());
}

void test_ends() {
  for (const MakePair make : kBoth) {
    StreamPair pair = make();
    std::string text;
    CHECK(send_text(*pair.one, "last") == 4 && shutdown(pair.one->fd(), SHUT_WR) == 0);
    CHECK(wait_for(pair.other->fd(), POLLIN) && receive_text(*pair.other, &text) == 4);
    CHECK(wait_for(pair.other->fd(), POLLIN) && receive_text(*pair.other, &text) == 0);
    // The other half goes on.
    CHECK(send_text(*pair.other, "still") == 5);
    CHECK(wait_for(pair.one->fd(), POLLIN) && receive_text(*pair.one, &text) == 5);
    CHECK(text == "still");
    pair.one.reset();
    // A signal would end this test; tcp learns of it with the answer to the first bytes.
    ssize_t sent = 0;
    for (int i = 0; i < 1000 && sent >= 0; ++i) {
      sent = send_text(*pair.other, "x");
      if (sent >= 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(sent == -EPIPE || sent == -ECONNRESET);
  }
}

void test_options_of_tcp() {
  const StreamPair pair = tcp_pair();
  const auto option = [&](int level, int name) {
    int value = -1;
    socklen_t bytes = sizeof(value);
    CHECK(getsockopt(pair.one->fd(), level, name, &value, &bytes) == 0);
    return value;
  };
  CHECK(option(IPPROTO_TCP, TCP_NODELAY) == 1);
  CHECK(option(SOL_SOCKET, SO_KEEPALIVE) == 1);
  CHECK(option(IPPROTO_TCP, TCP_KEEPIDLE) <= 10);
  CHECK(option(IPPROTO_TCP, TCP_USER_TIMEOUT) == 0);
  CHECK((fcntl(pair.one->fd(), F_GETFD) & FD_CLOEXEC) != 0);
  CHECK((fcntl(pair.other->fd(), F_GETFD) & FD_CLOEXEC) != 0);
  CHECK((fcntl(pair.other->fd(), F_GETFL) & O_NONBLOCK) != 0);
}

// A process that takes nothing is told apart from a host that answers nothing.
void test_health() {
  const StreamPair slow = tcp_pair();
  fill(*slow.one);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(tcp_health(slow.one->fd()).retransmits == 0);
  CHECK(tcp_health(unix_pair().one->fd()).unacknowledged == 0);

  const StreamPair dead = tcp_pair();
  CHECK(send_text(*dead.one, "x") == 1 && wait_for(dead.other->fd(), POLLIN));
  CHECK(tcp_health(dead.one->fd()).unacknowledged == 0);
  // From now on the other side's kernel drops what comes, as if the cable were out.
  sock_filter drop[] = {{.code = BPF_RET | BPF_K, .jt = 0, .jf = 0, .k = 0}};
  const sock_fprog program{.len = 1, .filter = drop};
  CHECK(setsockopt(dead.other->fd(), SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof(program)) == 0);
  CHECK(send_text(*dead.one, "y") == 1);
  CHECK(tcp_health(dead.one->fd()).unacknowledged == 1);
  TcpHealth health;
  for (int i = 0; i < 1000 && health.retransmits < 2; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    health = tcp_health(dead.one->fd());
  }
  CHECK(health.unacknowledged == 1 && health.retransmits >= 2);
}

// A process that does not ignore SIGPIPE, as most of C++ do not, outlives a peer that has left.
void test_lending_to_nobody() {
  const std::vector<uint8_t> block(256 << 10, 7);
  const iovec row{const_cast<uint8_t*>(block.data()), block.size()};
  SocketPair pair = tcp_sockets();
  LentPipe pipe;
  CHECK(pipe.send(pair.one.get(), {&row, 1}) > 0);
  pair.other.reset();
  ssize_t sent = 0;
  for (int turn = 0; turn < 1000 && (sent >= 0 || sent == -EAGAIN); ++turn) {
    sent = pipe.send(pair.one.get(), {&row, 1});
    if (sent == -EAGAIN) usleep(1000);
  }
  CHECK(sent == -EPIPE || sent == -ECONNRESET);
  CHECK(pipe.send(pair.one.get(), {&row, 1}) == -EPIPE);
  sigset_t pending;
  CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGPIPE) == 0);
  sigset_t blocked;
  CHECK(pthread_sigmask(SIG_SETMASK, nullptr, &blocked) == 0);
  CHECK(sigismember(&blocked, SIGPIPE) == 0);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : std::random_device{}();
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  test_parts_come_in_order();
  test_more_parts_than_the_kernel_takes();
  test_full_buffers(seed);
  test_descriptor_goes_along();
  test_descriptor_waits_for_room();
  test_unwanted_descriptors_are_closed();
  test_descriptors_without_frames_are_bounded();
  test_no_descriptors_left();
  test_ends();
  test_options_of_tcp();
  test_health();
  test_lending_to_nobody();
  std::puts("stream: ok");
  return 0;
}
