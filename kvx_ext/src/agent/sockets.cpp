// Sockets of either family: made, dialled, accepted, and asked about their other end.
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <string_view>

#include "agent/stream.h"

namespace kvx {

namespace {

constexpr int kBacklog = 256;
constexpr int kPortMax = 65535;
// RFC 8305 gives an address as long before it tries the next one.
constexpr int kRefusalMs = 250;
constexpr size_t kCongestionBytesMax = 16;  // TCP_CA_NAME_MAX of the kernel
constexpr int kTypes = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;

// The remedy that belongs to an errno, for people.
const char* remedy(int error) {
  switch (error) {
    case EADDRINUSE:
      return "; somebody listens there: stop that process, or use port 0 for a free one";
    case EADDRNOTAVAIL:
      return "; no interface of this machine has that address: see `ip address`";
    case EACCES:
    case EPERM:
      return "; not permitted: ports below 1024 need CAP_NET_BIND_SERVICE, and a firewall may "
             "refuse others";
    case EMFILE:
    case ENFILE:
      return "; too many open files: raise `ulimit -n`";
    case ECONNREFUSED:
      return "; nobody listens there: is the peer running, and is this its port?";
    case ENETUNREACH:
    case EHOSTUNREACH:
      return "; there is no route to it: see `ip route`";
    case EAFNOSUPPORT:
      return "; this machine has no such family of addresses (IPv6 is off?)";
    default:
      return "";
  }
}

Status failed(const std::string& what, int error) {
  const bool is_callers = error == EADDRINUSE || error == EACCES || error == EADDRNOTAVAIL;
  return {is_callers ? Code::kUsage : Code::kUnavailable,
          what + ": " + std::strerror(error) + remedy(error), error};
}

std::string endpoint(const std::string& host, int port) {
  const bool is_v6 = host.find(':') != std::string::npos;
  return (is_v6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

struct Addresses {
  Addresses() = default;
  Addresses(const Addresses&) = delete;
  Addresses& operator=(const Addresses&) = delete;
  ~Addresses() {
    if (first != nullptr) freeaddrinfo(first);
  }
  addrinfo* first = nullptr;
};

Status resolve(const std::string& host, int port, bool is_listening, Addresses* addresses) {
  if (port < (is_listening ? 0 : 1) || port > kPortMax) {
    return {Code::kUsage, "port " + std::to_string(port) + " does not exist: use " +
                              (is_listening ? "0 (any free one) to 65535" : "1 to 65535")};
  }
  // getaddrinfo would take an empty name of a peer for this machine.
  if (host.empty() && !is_listening) return {Code::kUsage, "the peer has no host name"};
  addrinfo wanted{};
  wanted.ai_socktype = SOCK_STREAM;
  wanted.ai_flags = AI_NUMERICSERV | (is_listening ? AI_PASSIVE : 0);
  const int result = getaddrinfo(host.empty() ? nullptr : host.c_str(),
                                 std::to_string(port).c_str(), &wanted, &addresses->first);
  if (result == 0) return Status::Ok();
  const int error = result == EAI_SYSTEM ? errno : 0;
  return {Code::kUnavailable,
          "the name \"" + host +
              "\" does not resolve: " + (error != 0 ? std::strerror(error) : gai_strerror(result)) +
              "; check its spelling, `getent hosts`, and the DNS that this machine uses",
          error};
}

void set_congestion_control(int fd, std::string_view name) {
  // Advice: what the kernel lacks or forbids leaves the socket as it is.
  (void)setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name.data(),
                   static_cast<socklen_t>(name.size()));
}

// Within a host there is no link to be polite to: what paces itself for one (bbr) takes two thirds
// of the throughput there, and a connection that was established with it goes on pacing whatever it
// is told later. So all begin without, and those to other hosts are given the system's choice.
void begin_unpaced(int fd) {
  for (const std::string_view name : {"reno", "cubic"}) set_congestion_control(fd, name);
}

// 0, or why not.
int begin_to_listen(const addrinfo& address, UniqueFd* fd) {
  UniqueFd made(socket(address.ai_family, kTypes, address.ai_protocol));
  if (!made) return errno;
  begin_unpaced(made.get());
  const int is_on = 1;
  if (setsockopt(made.get(), SOL_SOCKET, SO_REUSEADDR, &is_on, sizeof(is_on)) != 0 ||
      bind(made.get(), address.ai_addr, address.ai_addrlen) != 0 ||
      listen(made.get(), kBacklog) != 0) {
    return errno;
  }
  *fd = std::move(made);
  return 0;
}

int port_of(const sockaddr_storage& address) {
  if (address.ss_family == AF_INET6) {
    return ntohs(reinterpret_cast<const sockaddr_in6&>(address).sin6_port);
  }
  return ntohs(reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

// 0 once it has begun. Where there is another address to try, waits for a refusal first: a server
// that listens on 127.0.0.1 alone is "localhost", and that is ::1 before anything else.
int begin_to_connect(const addrinfo& address, UniqueFd* fd) {
  UniqueFd made(socket(address.ai_family, kTypes, address.ai_protocol));
  if (!made) return errno;
  begin_unpaced(made.get());
  if (connect(made.get(), address.ai_addr, address.ai_addrlen) != 0) {
    if (errno != EINPROGRESS) return errno;
    if (address.ai_next != nullptr) {
      pollfd one{.fd = made.get(), .events = POLLOUT, .revents = 0};
      const bool is_decided = poll(&one, 1, kRefusalMs) == 1;
      const int error = is_decided ? connect_error(made.get()) : 0;
      if (error != 0) return error;
    }
  }
  *fd = std::move(made);
  return 0;
}

std::string address_text(const sockaddr_storage& address, socklen_t bytes) {
  if (address.ss_family == AF_UNIX) return "unix";  // those who dial are not named
  char host[NI_MAXHOST] = {};
  if (getnameinfo(reinterpret_cast<const sockaddr*>(&address), bytes, host, sizeof(host), nullptr,
                  0, NI_NUMERICHOST) != 0) {
    return "unknown";
  }
  return endpoint(host, port_of(address));
}

// Where accepting fails because of one connection, not of the listener: see accept(2).
bool is_of_connection(int error) {
  return error == EINTR || error == ECONNABORTED || error == EPROTO;
}

}  // namespace

Status listen_tcp_socket(const std::string& host, int port, UniqueFd* fd, int* bound_port) {
  Addresses addresses;
  if (Status status = resolve(host, port, true, &addresses); !status.ok()) return status;
  int error = 0;
  for (addrinfo* one = addresses.first; one != nullptr && !*fd; one = one->ai_next) {
    error = begin_to_listen(*one, fd);
  }
  if (!*fd) return failed("cannot listen on " + endpoint(host, port), error);
  sockaddr_storage bound{};
  socklen_t bytes = sizeof(bound);
  if (getsockname(fd->get(), reinterpret_cast<sockaddr*>(&bound), &bytes) != 0) {
    return failed("getsockname of " + endpoint(host, port), errno);
  }
  *bound_port = port_of(bound);
  return Status::Ok();
}

Status dial_tcp_socket(const std::string& host, int port, UniqueFd* fd) {
  Addresses addresses;
  if (Status status = resolve(host, port, false, &addresses); !status.ok()) return status;
  int error = 0;
  for (addrinfo* one = addresses.first; one != nullptr; one = one->ai_next) {
    error = begin_to_connect(*one, fd);
    if (error == 0) return Status::Ok();
  }
  return failed("cannot connect to " + endpoint(host, port), error);
}

Status pair_sockets(UniqueFd* one, UniqueFd* other) {
  int fds[2] = {-1, -1};
  if (socketpair(AF_UNIX, kTypes, 0, fds) != 0) return failed("socketpair", errno);
  *one = UniqueFd(fds[0]);
  *other = UniqueFd(fds[1]);
  return Status::Ok();
}

UniqueFd accept_socket(int listener, std::string* address) {
  sockaddr_storage peer{};
  socklen_t bytes = 0;
  int accepted = -1;
  do {
    bytes = sizeof(peer);
    accepted =
        accept4(listener, reinterpret_cast<sockaddr*>(&peer), &bytes, SOCK_NONBLOCK | SOCK_CLOEXEC);
  } while (accepted < 0 && is_of_connection(errno));
  if (accepted < 0) return UniqueFd();
  *address = address_text(peer, bytes);
  return UniqueFd(accepted);
}

int connect_error(int fd) {
  int error = 0;
  socklen_t bytes = sizeof(error);
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &bytes) != 0) return errno;
  return error;
}

namespace {

bool is_on_this_host(int fd) {
  sockaddr_storage ours{};
  sockaddr_storage theirs{};
  socklen_t our_bytes = sizeof(ours);
  socklen_t their_bytes = sizeof(theirs);
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&ours), &our_bytes) != 0 ||
      getpeername(fd, reinterpret_cast<sockaddr*>(&theirs), &their_bytes) != 0 ||
      ours.ss_family != theirs.ss_family) {
    return false;
  }
  if (ours.ss_family == AF_INET) {
    return reinterpret_cast<const sockaddr_in*>(&ours)->sin_addr.s_addr ==
           reinterpret_cast<const sockaddr_in*>(&theirs)->sin_addr.s_addr;
  }
  return std::memcmp(&reinterpret_cast<const sockaddr_in6*>(&ours)->sin6_addr,
                     &reinterpret_cast<const sockaddr_in6*>(&theirs)->sin6_addr,
                     sizeof(in6_addr)) == 0;
}

}  // namespace

void tune_connected_tcp(int fd) {
  if (is_on_this_host(fd)) return;
  // A new socket has what the system chose.
  const UniqueFd fresh(socket(AF_INET, kTypes, 0));
  char name[kCongestionBytesMax] = {};
  socklen_t bytes = sizeof(name);
  if (fresh && getsockopt(fresh.get(), IPPROTO_TCP, TCP_CONGESTION, name, &bytes) == 0) {
    set_congestion_control(fd, name);
  }
}

void tune_tcp(int fd) {
  const int is_on = 1;
  // A host that went away without a word is noticed after 5 + 3 x 2 s, should nobody send to it.
  const int idle_s = 5;
  const int interval_s = 2;
  const int probes = 3;
  // close() returns at once and the kernel sends what is left: a last frame says why.
  const linger no_linger{.l_onoff = 0, .l_linger = 0};
  // Each is advice: a socket that refuses one works, only slower to notice.
  (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &is_on, sizeof(is_on));
  (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &is_on, sizeof(is_on));
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
  (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
  (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &no_linger, sizeof(no_linger));
}

Status peer_process(int fd, PeerProcess* process) {
  ucred peer{};
  socklen_t bytes = sizeof(peer);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) {
    return failed("SO_PEERCRED", errno);
  }
  // A tcp socket answers too, with nobody.
  if (peer.uid == static_cast<uid_t>(-1)) {
    return {Code::kUsage, "only a unix socket knows the process at its other end"};
  }
  *process = {.pid = peer.pid, .uid = peer.uid};
  return Status::Ok();
}

TcpHealth tcp_health(int fd) {
  tcp_info info{};
  socklen_t bytes = sizeof(info);
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &bytes) != 0) return {};
  return {.unacknowledged = info.tcpi_unacked, .retransmits = info.tcpi_retransmits};
}

}  // namespace kvx
