#include "agent/connection.h"

#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "agent/agent_core.h"
#include "agent/connection_lock.h"
#include "agent/ends.h"

namespace kvx {

namespace {

// Moved under the lock in one go: whoever else wants the connection waits that long.
constexpr int64_t kReceiveBudget = 1 << 20;
constexpr int64_t kSendBudget = 4 << 20;
// Sent by whoever submits, so that small requests leave at once; the rest is the loop's.
constexpr int64_t kInlineSendBudget = 64 << 10;
// Frames that a peer does not take: it is not reading, or asks without end.
constexpr int64_t kQueuedBytesMax = int64_t{192} << 20;

// How long a thread that waits for a small transfer looks before it sleeps; it yields meanwhile.
constexpr std::chrono::microseconds kAwake{50};
constexpr timespec kNone{};

double seconds_since(TimePoint begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

Connection::Connection(std::shared_ptr<AgentCore> core, Loop& loop, uint64_t id,
                       std::unique_ptr<Stream> stream, bool is_unix, bool is_dialled,
                       std::string address)
    : core_(std::move(core)),
      loop_(loop),
      id_(id),
      is_unix_(is_unix),
      is_dialled_(is_dialled),
      address_(std::move(address)),
      begun_at_(Clock::now()),
      stream_(std::move(stream)),
      sender_(core_->options().piece_bytes),
      connects_by_(begun_at_),
      heard_at_(begun_at_),
      asked_at_(begun_at_) {}

Connection::~Connection() = default;

Status Connection::start(bool is_connecting, TimePoint connects_by) {
  Locked locked(*this);
  connects_by_ = connects_by;
  interest_ = is_connecting ? uint32_t{EPOLLOUT} : uint32_t{EPOLLIN};
  stage_ = is_connecting ? Stage::kConnecting : Stage::kGreeting;
  Status status = loop_.watch(id_, stream_->fd(), interest_, shared_from_this());
  if (!status.ok()) return status;
  core_->note_greeting(1);
  if (is_unix_ && !is_connecting) (void)peer_process(stream_->fd(), &process_);
  if (!is_connecting) push_event(EventKind::kOpened, {});
  return Status::Ok();
}

void Connection::push_event(EventKind kind, std::vector<uint8_t> payload) {
  const bool fits = core_->events().push(
      {.kind = kind, .connection = id_, .peer = peer(), .payload = std::move(payload)});
  if (!fits) close_locked("its messages were not taken: " + std::to_string(kEventsMax) + " wait");
}

ConnectionInfo Connection::info() {
  Locked locked(*this);
  const TcpHealth health = is_closed() ? TcpHealth{} : tcp_health(stream_->fd());
  return {.peer = peer(),
          .is_unix = is_unix_,
          .is_dialled = is_dialled_,
          .is_encrypted = stream_->is_encrypted(),
          .address = address_,
          .pid = process_.pid,
          .uid = process_.uid,
          .heard_ago_s = seconds_since(heard_at_),
          .answered_ago_s = is_asked_ ? seconds_since(asked_at_) : 0.0,
          .unacknowledged = health.unacknowledged,
          .retransmits = health.retransmits,
          .bytes_in = bytes_in_,
          .bytes_out = bytes_out_,
          .queued_bytes = sender_.queued_bytes()};
}

int64_t Connection::served() {
  Locked locked(*this);
  return static_cast<int64_t>(serving_.size() + unconfirmed_.size() + landings_.size() +
                              pulls_.size());
}

void Connection::queue_frame(wire::Type type, uint64_t id, std::span<const uint8_t> body, int fd) {
  sender_.queue(type, id, body, fd);
  if (sender_.queued_bytes() > kQueuedBytesMax) {
    close_locked("it takes nothing: " + std::to_string(sender_.queued_bytes()) +
                 " bytes of frames wait for it");
  }
}

Status Connection::send_payload(wire::Type type, std::span<const uint8_t> payload) {
  if (payload.size() > wire::bytes_max(type)) {
    return {Code::kUsage, std::to_string(payload.size()) + " bytes; at most " +
                              std::to_string(wire::bytes_max(type)) + " fit one of these"};
  }
  Locked locked(*this);
  const bool may_send = type == wire::Type::kGreeting ? stage_ == Stage::kGreeting : is_open();
  if (!may_send) return {Code::kPeerLost, "the connection is closed, or not open for this"};
  if (type != wire::Type::kGreeting && sender_.queued_bytes() > kQueuedBytesMax / 2) {
    return {Code::kCapacity, "the peer takes nothing: " + std::to_string(sender_.queued_bytes()) +
                                 " bytes wait for it"};
  }
  if (type == wire::Type::kGreeting) is_paused_ = false;
  queue_frame(type, 0, payload);
  pump(true);
  return Status::Ok();
}

Status Connection::approve(uint64_t peer) {
  Locked locked(*this);
  if (stage_ != Stage::kGreeting) return {Code::kPeerLost, "the connection is closed"};
  peer_.store(peer, std::memory_order_release);
  stage_ = Stage::kOpen;
  is_paused_ = false;
  heard_at_ = Clock::now();
  core_->note_greeting(-1);
  core_->join_peer(shared_from_this(), peer, process_);
  if (is_unix_) {
    const wire::RegionNews news{.access = wire::RegionAccess::kPages,
                                .bytes = kLeaseSlots * int64_t{sizeof(LeaseWord)}};
    queue_frame(wire::Type::kRegion, 0, wire::encode(news), core_->leases().fd());
    for (const auto& region : core_->regions().all()) announce_locked(*region);
  }
  pump(true);
  return Status::Ok();
}

void Connection::announce_locked(const ExposedRegion& region) {
  if (region.is_opaque()) return;
  const bool is_mapped = region.fd() >= 0;
  const wire::RegionNews news{
      .access = is_mapped ? wire::RegionAccess::kMapped : wire::RegionAccess::kForeign,
      .id = region.id(),
      .bytes = region.bytes(),
      .fd_offset = region.fd_offset(),
      .base = reinterpret_cast<uint64_t>(region.base())};
  queue_frame(wire::Type::kRegion, region.id(), wire::encode(news), region.fd());
}

void Connection::announce(const ExposedRegion& region) {
  Locked locked(*this);
  if (!is_open() || !is_unix_) return;
  announce_locked(region);
  flush();
}

void Connection::announce_gone(uint32_t region) {
  Locked locked(*this);
  if (!is_open() || !is_unix_) return;
  queue_frame(wire::Type::kRegionGone, region, {});
  flush();
}

void Connection::close(const std::string& reason) {
  Locked locked(*this);
  close_locked(reason);
}

void Connection::close_locked(const std::string& reason) {
  if (is_closed()) return;
  if (stage_ != Stage::kOpen) core_->note_greeting(-1);
  stage_ = Stage::kClosed;
  // The descriptor stays until nobody can be waiting on it any more.
  loop_.forget(id_, stream_->fd());
  (void)::shutdown(stream_->fd(), SHUT_RDWR);
  release_flows();
  later_.push_back(
      [core = core_, self = shared_from_this(), reason] { core->leave(self, reason); });
}

void Connection::tick(TimePoint now, double ping_s, double greeting_s) {
  Locked locked(*this);
  switch (stage_.load()) {
    case Stage::kConnecting:
      if (now >= connects_by_) close_locked("nobody answered in time");
      return;
    case Stage::kGreeting:
      if (now >=
          std::max(begun_at_, connects_by_) + std::chrono::duration_cast<Clock::duration>(
                                                  std::chrono::duration<double>(greeting_s))) {
        close_locked("it was not greeted within " + std::to_string(greeting_s) + " s");
      }
      return;
    case Stage::kOpen:
      if (is_asked_ || seconds_since(heard_at_) < ping_s) return;
      is_asked_ = true;
      asked_at_ = now;
      queue_frame(wire::Type::kPing, static_cast<uint64_t>(now.time_since_epoch().count()), {});
      flush();
      return;
    case Stage::kClosed:
      return;
  }
}

void Connection::flush() { pump(false, kInlineSendBudget); }

void Connection::pump(bool is_readable) { pump(is_readable, kSendBudget); }

void Connection::pump(bool is_readable, int64_t send_budget) {
  if (is_closed() || stage_ == Stage::kConnecting) return;
  if (is_readable) {
    const int64_t received = receiver_.receive(*stream_, *this, kReceiveBudget);
    if (received < 0) {
      close_locked(receiver_.failure());
      return;
    }
    bytes_in_ += received;
    if (received > 0) heard_at_ = Clock::now();
  }
  if (is_closed()) return;
  if (sender_.has_work()) {
    const int64_t sent = sender_.send(*stream_, send_budget);
    settle_finished_sources();
    if (sent < 0) {
      const std::string why = stream_->failure();
      close_locked(why.empty()
                       ? std::string("sending failed: ") + std::strerror(static_cast<int>(-sent))
                       : why);
      return;
    }
    bytes_out_ += sent;
  }
  if (is_closed()) return;
  update_interest();
  // The socket may never become readable for what TLS holds already.
  if (is_readable && !is_paused_ && helper_ < 0 && stream_->has_buffered()) {
    loop_.call_at(Clock::now(), [weak = weak_from_this()] {
      if (const auto self = weak.lock(); self != nullptr) self->on_ready(EPOLLIN);
    });
  }
}

bool Connection::wants_to_send() const {
  if (stream_->wants_write_to_receive()) return true;
  return sender_.has_work() && !stream_->wants_read_to_send();
}

void Connection::update_interest() {
  if (is_closed()) return;
  uint32_t wanted = 0;
  if (!is_paused_) wanted |= EPOLLIN;
  if (wants_to_send()) wanted |= EPOLLOUT;
  if (helper_ >= 0) {
    // It waits for what was wanted when it began to.
    if ((wanted & ~helper_waits_for_ & EPOLLOUT) != 0) {
      const uint64_t one = 1;
      (void)!write(helper_, &one, sizeof(one));
    }
    wanted = 0;
  }
  if (wanted == interest_) return;
  interest_ = wanted;
  loop_.change(id_, stream_->fd(), wanted);
}

void Connection::on_ready(uint32_t events) {
  Locked locked(*this);
  if (stage_ == Stage::kConnecting) {
    const int error = connect_error(stream_->fd());
    if (error != 0) {
      close_locked(std::string("connecting failed: ") + std::strerror(error));
      return;
    }
    if ((events & EPOLLOUT) == 0) return;
    stage_ = Stage::kGreeting;
    connects_by_ = Clock::now();
    if (is_unix_) {
      (void)peer_process(stream_->fd(), &process_);
    } else {
      tune_connected_tcp(stream_->fd());
    }
    push_event(EventKind::kOpened, {});
  }
  // While a waiting thread receives, an error or hang-up is its to find.
  if (helper_ >= 0) return;
  pump(!is_paused_);
  if (!is_closed() && is_paused_ && (events & (EPOLLHUP | EPOLLERR)) != 0) {
    close_locked("the peer closed the connection");
  }
}

bool Connection::receive_until(const std::function<bool()>& is_over, int waker, TimePoint until,
                               bool spins) {
  {
    Locked locked(*this);
    if (helper_ >= 0 || !is_open()) return false;
    helper_ = waker;
  }
  std::array<pollfd, 2> fds{{{.fd = stream_->fd(), .events = POLLIN, .revents = 0},
                             {.fd = waker, .events = POLLIN, .revents = 0}}};
  const TimePoint awake_until = Clock::now() + kAwake;
  while (!is_over() && is_open()) {
    bool has_more;
    {
      Locked locked(*this);
      has_more = stream_->has_buffered();
      fds[0].events = static_cast<short>(wants_to_send() ? POLLIN | POLLOUT : POLLIN);
      helper_waits_for_ = static_cast<uint32_t>(fds[0].events);
      update_interest();
    }
    const TimePoint now = Clock::now();
    if (now >= until) break;
    const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(until - now).count();
    const timespec timeout{.tv_sec = static_cast<time_t>(left / 1'000'000'000),
                           .tv_nsec = static_cast<long>(left % 1'000'000'000)};
    const bool is_awake = spins && now < awake_until;
    const timespec* patience = is_awake || has_more ? &kNone : &timeout;
    const int ready = ppoll(fds.data(), fds.size(), patience, nullptr);
    if (ready == 0 && is_awake) sched_yield();
    if (ready <= 0 && !has_more) continue;
    if (fds[1].revents != 0) {
      uint64_t count;
      (void)!read(waker, &count, sizeof(count));
    }
    if (fds[0].revents == 0 && !has_more) continue;
    Locked locked(*this);
    pump(true);
  }
  Locked locked(*this);
  helper_ = -1;
  helper_waits_for_ = 0;
  update_interest();
  return true;
}

}  // namespace kvx
